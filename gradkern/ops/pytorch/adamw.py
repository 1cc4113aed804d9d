"""AdamW on a combination of gradients, in PyTorch: each block is combined and stepped while it is in cache.

The step itself is PyTorch's fused AdamW, on a block of each tensor.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import AdamWState, AdamWStep, Mask, TaskGrads, numels
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.combination import combine_flat
from gradkern.ops.pytorch.drops import Drops

COMBINED = 1 << 18
"""The count of numbers combined at a time, 1 MB of float32. With half to four times as many a step took as long."""


class Piece(NamedTuple):
    """Neighbouring entries of one parameter and their combined gradient."""

    k: int
    start: int
    g: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the same entries of a tensor with the parameter's layout."""
        return flat(tensor)[self.start : self.start + len(self.g)]


@implements(operators.adamw)
def adamw(
    rows: TaskGrads,
    w: Tensor,
    state: AdamWState,
    step: AdamWStep,
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Take a step of AdamW along Σ_t w[s, t] grads[t, k], and along 0 where the mask drops."""
    if step.found_inf is not None and bool(step.found_inf):
        return
    if mask is None and _is_along_gradients(rows, w, state):  # the way of a small model, without a slice
        grads = [g for g in rows.grads if g is not None]
        _fused(state.params, grads, state.moments, state.steps, step)
        return
    drops = None if mask is None else Drops(mask, numels(state.params, len(state.params)))
    for pieces in _combined(rows, w, state.params, drops, kept):
        _step(pieces, state, step)


def _is_along_gradients(rows: TaskGrads, w: Tensor, state: AdamWState) -> bool:
    """Return whether each parameter has one gradient, of weight 1 and of its moments' dtype, and all are contiguous."""
    if rows.n_tasks > 1 or w.tolist() != [[1.0]] * len(w):
        return False
    tensors = [t for t in (*rows.grads, *state.params) if t is not None]
    are_alike = {(t.dtype, t.is_contiguous()) for t in tensors} == {(state.moments[0].dtype, True)}
    return are_alike and len(tensors) == 2 * len(state.params)


def _combined(
    rows: TaskGrads, w: Tensor, params: Sequence[Tensor], drops: Drops | None, kept: Tensor | None
) -> Iterator[list[Piece]]:
    """Yield combined pieces, as many at a time as stay in cache; each list overwrites the memory of the last one.

    A gradient that equals its own combination, and has no entry to erase, is used in place.
    """
    weights = w.tolist()
    scratch = params[0].new_empty(COMBINED, dtype=arithmetic_dtype(params[0].dtype))
    pieces: list[Piece] = []
    used = 0
    for k, p in enumerate(params):
        column = [None if g is None else flat(g) for g in rows.column(k)]
        of_segment = weights[rows.segments[k]]
        if drops is None or not drops.masks(k):
            own = _own_combination(column, of_segment)
            if own is not None and own.dtype == scratch.dtype:
                pieces.append(Piece(k, 0, own))
                continue
        for start in range(0, p.numel(), COMBINED):
            stop = min(start + COMBINED, p.numel())
            if used + stop - start > COMBINED:
                yield _erased(pieces, drops, kept)
                pieces, used = [], 0
            g = scratch[used : used + stop - start]
            combine_flat([None if row is None else row[start:stop] for row in column], of_segment, g)
            pieces.append(Piece(k, start, g))
            used += stop - start
    if pieces:
        yield _erased(pieces, drops, kept)


def _erased(pieces: list[Piece], drops: Drops | None, kept: Tensor | None) -> list[Piece]:
    """Set dropped entries to 0, and return the pieces."""
    if drops is not None:
        for k, start, g in pieces:
            drops.erase(k, start, g, kept)
    return pieces


def _own_combination(rows: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Return the only row with a nonzero weight, if its weight is 1."""
    nonzero = [(row, w) for row, w in zip(rows, weights, strict=True) if row is not None and w != 0.0]
    return nonzero[0][0] if len(nonzero) == 1 and nonzero[0][1] == 1.0 else None


def _step(pieces: list[Piece], state: AdamWState, step: AdamWStep) -> None:
    """Take PyTorch's fused step on the pieces."""
    n = len(state.params)
    stored = [piece.of(state.params[piece.k]) for piece in pieces]
    # 16-bit parameters are stepped in float32, and rounded once.
    stepped = [p.to(piece.g.dtype) for p, piece in zip(stored, pieces, strict=True)]
    moments = [
        piece.of(state.moments[first + piece.k]) for first in range(0, len(state.moments), n) for piece in pieces
    ]
    _fused(stepped, [piece.g for piece in pieces], moments, [state.steps[piece.k] for piece in pieces], step)
    for p, new in zip(stored, stepped, strict=True):
        if p.dtype != new.dtype:
            p.copy_(new)


def _fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    step: AdamWStep,
) -> None:
    """Call PyTorch's fused step. ``moments`` holds those of one name after another."""
    n = len(params)
    lr, beta1, beta2, weight_decay, eps = step.hyperparameters
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(moments[:n]),
        list(moments[n : 2 * n]),
        list(moments[2 * n :]),
        list(steps),
        lr=lr if step.lr_scale is None else lr * step.lr_scale.item(),
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=len(moments) > 2 * n,
        maximize=False,
    )
