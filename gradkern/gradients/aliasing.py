"""Gradients that somebody else holds: a hook, or a custom Function that hands out a buffer of its own.

A row is read after all backward passes, and may be overwritten then. A Function that fills the same buffer in each pass
would have overwritten the first task's gradient by then, and one that hands out what it has saved for a further pass
would find it overwritten. So what is held elsewhere is copied before the next pass. Autograd's own gradients are held
by nobody, and are not. (Memory that PyTorch does not count, such as a NumPy array's, cannot be told.)
"""

import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def copies(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``grads``, with a copy in place of each tensor that is held elsewhere, itself, its base or its storage."""
    times = Counter(id(g) for g in grads)  # one tensor may be the gradient of two parameters
    return [g.clone() if g is not None and _is_held(g, times[id(g)] - 1) else g for g in grads]


def _is_held(g: Tensor, more: int) -> bool:
    alone = _ALONE_VIEW if g._base is not None else _ALONE
    own, uses, base, storage = _references(g)
    return own > alone[0] + more or uses > alone[1] or base > alone[2] or storage > alone[3]


def _references(g: Tensor) -> tuple[int, int, int, int]:
    """How many refer to the tensor from Python, and at all; to the one it is a view of; and to its memory."""
    base = 0 if g._base is None else sys.getrefcount(g._base)
    storage = 0 if g.layout != torch.strided else torch._C._storage_Use_Count(g.untyped_storage()._cdata)
    uses = g._use_count()  # type: ignore[attr-defined]  # torch's stubs lack it
    return sys.getrefcount(g), uses, base, storage


def _references_if_nobody_holds(tensors: Sequence[Tensor]) -> tuple[int, int, int, int]:
    def as_above(g: Tensor) -> tuple[int, int, int, int]:
        return _references(g)

    return next(as_above(g) for g in tensors)


_ALONE = _references_if_nobody_holds((torch.zeros(2),))
_ALONE_VIEW = _references_if_nobody_holds((torch.zeros(2).view(2, 1),))
