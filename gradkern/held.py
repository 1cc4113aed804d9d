"""Gradients that somebody else holds: a hook, or a custom Function that hands out a buffer of its own.

A row is read after all backward passes. A Function that fills the same buffer in each pass would have overwritten the
first task's gradient by then, so what is held elsewhere is copied before the next pass. Autograd's own gradients are
held by nobody, and are not.
"""

import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def copies(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``grads``, with a copy in place of each tensor that Python code outside holds, itself or the one it views."""
    times = Counter(id(g) for g in grads)  # one tensor may be the gradient of two parameters
    return [g.clone() if g is not None and _is_held(g, times[id(g)] - 1) else g for g in grads]


def _is_held(g: Tensor, more: int) -> bool:
    own, base = _references(g)
    return own > _ALONE[0] + more or base > _ALONE[1]


def _references(g: Tensor) -> tuple[int, int]:
    return sys.getrefcount(g), 0 if g._base is None else sys.getrefcount(g._base)


def _counts_of_a_tensor_that_nobody_holds() -> tuple[int, int]:
    def as_above(g: Tensor) -> tuple[int, int]:
        return _references(g)

    return next(as_above(g) for g in (torch.zeros(2).view(2, 1),))


_ALONE = _counts_of_a_tensor_that_nobody_holds()
