"""Copies of aliased gradients: those that a hook refers to, or a custom Function that returns a buffer of its own.

A gradient is read after all backward passes, and may be overwritten then. A Function that fills the same buffer in each
pass would already have overwritten the first task's gradient. A Function that returns a tensor saved for a further pass
would find that tensor overwritten. So an aliased gradient is copied before the next pass. Nothing else refers to
autograd's own gradients, so they are not copied. (References that PyTorch does not count, such as those of a NumPy
array, cannot be detected.)
"""

import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def copies(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return ``grads``, with copies of those that have other references: to the tensor, its base or its storage."""
    occurrences = Counter(id(g) for g in grads)  # one tensor may be the gradient of two parameters
    return [g.clone() if g is not None and _is_aliased(g, occurrences[id(g)] - 1) else g for g in grads]


def _is_aliased(g: Tensor, repeats: int) -> bool:
    """Return whether ``g`` has more references than an unaliased tensor, besides ``repeats`` in the list."""
    unaliased = _UNALIASED_VIEW if g._base is not None else _UNALIASED
    own, uses, base, storage = _references(g)
    return own > unaliased[0] + repeats or uses > unaliased[1] or base > unaliased[2] or storage > unaliased[3]


def _references(g: Tensor) -> tuple[int, int, int, int]:
    """Return the numbers of references: to the tensor from Python, to it in all, to its base, and to its storage."""
    base = 0 if g._base is None else sys.getrefcount(g._base)
    storage = 0 if g.layout != torch.strided else torch._C._storage_Use_Count(g.untyped_storage()._cdata)
    uses = g._use_count()  # type: ignore[attr-defined]  # torch's stubs lack it
    return sys.getrefcount(g), uses, base, storage


def _references_if_unaliased(tensors: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Return the numbers of references to a tensor without aliases, in as many nested calls as in :func:`copies`."""

    def nested(g: Tensor) -> tuple[int, int, int, int]:
        return _references(g)

    return next(nested(g) for g in tensors)


_UNALIASED = _references_if_unaliased((torch.zeros(2),))
_UNALIASED_VIEW = _references_if_unaliased((torch.zeros(2).view(2, 1),))
