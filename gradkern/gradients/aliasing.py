"""Copies of aliased gradients: those that a hook refers to, or a custom Function that returns a buffer of its own.

A gradient that is kept is read after all backward passes, and may be overwritten then. A Function that fills the same
buffer in each pass would already have overwritten the first task's gradient. A Function that returns a tensor saved for
a further pass would find that tensor overwritten. So an aliased gradient is copied before the next pass. Nothing else
refers to autograd's own gradients, so they are not copied. (References that PyTorch does not count, such as those of a
NumPy array, cannot be detected.)
"""

from collections import Counter
from collections.abc import Sequence
from sys import getrefcount

import torch
from torch import Tensor

_References = tuple[int, int, int, int]
"""The numbers of references: to a tensor from Python, to it in all, to its base, and to its storage."""


def copies(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return ``grads``, with copies of those that have other references: to the tensor, its base or its storage."""
    found = _references(grads)
    if _UNALIASED.issuperset(found):
        return list(grads)
    occurrences = Counter(id(g) for g in grads)  # one tensor may be the gradient of two parameters
    return [
        g.clone() if g is not None and _is_aliased(n, occurrences[id(g)] - 1) else g
        for g, n in zip(grads, found, strict=True)
    ]


def _references(grads: Sequence[Tensor | None]) -> list[_References | None]:
    # One expression in one loop, because it runs for every gradient of every step. The loop is the same for all
    # sequences, so that its own references are the same for all gradients.
    return [
        None
        if g is None
        else (
            getrefcount(g),
            g._use_count(),  # type: ignore[attr-defined]  # torch's stubs lack it
            0 if (base := g._base) is None else getrefcount(base),
            0 if g.is_sparse else torch._C._storage_Use_Count(g.untyped_storage()._cdata),
        )
        for g in grads
    ]


def _is_aliased(found: _References | None, repeats: int) -> bool:
    """Return whether there are more references than to an unaliased tensor, besides ``repeats`` in the list."""
    assert found is not None
    own, uses, base, storage = found
    unaliased = _VIEW if base else _DENSE
    return own > unaliased[0] + repeats or uses > unaliased[1] or base > unaliased[2] or storage > unaliased[3]


def _references_if_unaliased(tensors: Sequence[Tensor]) -> list[_References]:
    return [found for found in _references(tensors) if found is not None]


_DENSE, _VIEW, _SPARSE = _references_if_unaliased(
    (
        torch.zeros(2, device="cpu"),
        torch.zeros(2, device="cpu").view(2, 1),
        torch.zeros(2, 1, device="cpu").to_sparse_coo(),
    )
)
_UNALIASED = frozenset((_DENSE, _VIEW, _SPARSE, None))
