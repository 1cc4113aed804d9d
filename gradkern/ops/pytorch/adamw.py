"""AdamW on a combination of gradients, in plain PyTorch: a block is combined and taken into the step while in cache.

The step itself is PyTorch's fused one, on a block of each tensor.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.combination import combine_flat
from gradkern.ops.pytorch.suppressed import Drops, erase
from gradkern.ops.registration import operator
from gradkern.ops.schema import arithmetic_dtype, numels


@operator("adamw")
def adamw(
    grads: Sequence[Tensor | None],
    w: Tensor,
    segments: Sequence[int],
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
) -> None:
    """A step of AdamW along Σ_t w[segments[k], t] grads[t, k]."""
    if _skipped(found_inf):
        return
    for pieces in _blocks(grads, w, segments, params, None):
        _step(pieces, params, moments, steps, lr_scale, hyperparameters)


@operator("adamw.masked")
def adamw_masked(
    grads: Sequence[Tensor | None],
    w: Tensor,
    segments: Sequence[int],
    units: Sequence[int],
    block: int,
    mask: Tensor,
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
) -> Tensor:
    """The same along what the mask keeps; how many entries of masked tensors that were."""
    kept = mask.new_zeros(())
    if _skipped(found_inf):
        return kept
    drops = Drops(units, numels(params, len(params)), block, mask)
    for pieces in _blocks(grads, w, segments, params, units):
        for k, start, g in pieces:
            if units[k] >= 0:
                drop = drops.entries(k, start, len(g))
                erase(g, drop)
                kept += len(g) - drop.count_nonzero()
        _step(pieces, params, moments, steps, lr_scale, hyperparameters)
    return kept


BLOCK = 1 << 18
"""Numbers of a combined gradient at a time, 1 MB of float32. With half to four times as many a step took as long."""

Piece = tuple[int, int, Tensor]
"""A tensor's number, the first of some neighbouring entries of it, and their combined gradient."""


def _blocks(
    grads: Sequence[Tensor | None],
    w: Tensor,
    segments: Sequence[int],
    params: Sequence[Tensor],
    units: Sequence[int] | None,
) -> Iterator[list[Piece]]:
    """Combined gradients of as many tensors, or as much of one, as stay in cache; each block overwrites the last.

    A gradient that is its own combination, and of which no entry has to be erased, is left where it is.
    """
    n, weights = len(params), w.tolist()
    scratch = params[0].new_empty(BLOCK, dtype=arithmetic_dtype(params[0].dtype))
    pieces: list[Piece] = []
    used = 0
    for k, p in enumerate(params):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        if units is None or units[k] < 0:
            alone = _alone(rows, weights[segments[k]])
            if alone is not None and alone.dtype == scratch.dtype:
                pieces.append((k, 0, alone))
                continue
        for start in range(0, p.numel(), BLOCK):
            stop = min(start + BLOCK, p.numel())
            if used + stop - start > BLOCK:
                yield pieces
                pieces, used = [], 0
            g = scratch[used : used + stop - start]
            combine_flat([None if row is None else row[start:stop] for row in rows], weights[segments[k]], g)
            pieces.append((k, start, g))
            used += stop - start
    if pieces:
        yield pieces


def _alone(rows: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """The one row that counts, where its weight is 1."""
    counting = [(row, w) for row, w in zip(rows, weights, strict=True) if row is not None and w != 0.0]
    return counting[0][0] if len(counting) == 1 and counting[0][1] == 1.0 else None


def _step(
    pieces: list[Piece],
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
) -> None:
    n = len(params)
    lr, beta1, beta2, weight_decay, eps = hyperparameters
    stored = [_piece(params[k], start, g) for k, start, g in pieces]
    # 16-bit parameters are stepped in float32, and rounded once.
    stepped = [p.to(g.dtype) for p, (_, _, g) in zip(stored, pieces, strict=True)]
    first, second, *largest = [
        [_piece(moments[row * n + k], start, g) for k, start, g in pieces] for row in range(len(moments) // n)
    ]
    torch._fused_adamw_(
        stepped,
        [g for _, _, g in pieces],
        first,
        second,
        largest[0] if largest else [],
        [steps[k] for k, _, _ in pieces],
        lr=lr if lr_scale is None else lr * lr_scale.item(),
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=bool(largest),
        maximize=False,
    )
    for p, new in zip(stored, stepped, strict=True):
        if p.dtype != new.dtype:
            p.copy_(new)


def _piece(tensor: Tensor, start: int, g: Tensor) -> Tensor:
    return flat(tensor)[start : start + len(g)]


def _skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf)
