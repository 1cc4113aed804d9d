"""Gramian and combination under gradient suppression, in plain PyTorch: the mask is drawn a window at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.ops.philox import dropped
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.combination import combine_flat
from gradkern.ops.pytorch.gramian import segment_gramians
from gradkern.ops.registration import operator
from gradkern.ops.schema import numels

WINDOW = 1 << 18
"""Units drawn at a time: their words, 2 MB of int64, are enough for two threads and stay in the caches of both, and
many small tensors share one drawing. Half as many, which PyTorch gives to one thread, took twice as long."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@operator("gramian.masked")
def gramian_masked(
    grads: Sequence[Tensor | None],
    segments: Sequence[int],
    n_segments: int,
    units: Sequence[int],
    block: int,
    mask: Tensor,
) -> Tensor:
    """M = J Jᵀ over the kept entries, per segment."""
    drops = Drops(units, numels(grads, len(segments)), block, mask)

    def erase_dropped(k: int, start: int, rows: Tensor) -> None:
        if units[k] >= 0:
            erase(rows, drops.entries(k, start, rows.shape[1]))

    return segment_gramians(grads, segments, n_segments, erase_dropped)


@operator("combine.masked")
def combine_masked(
    grads: Sequence[Tensor | None],
    w: Tensor,
    segments: Sequence[int],
    units: Sequence[int],
    block: int,
    mask: Tensor,
    out: Sequence[Tensor],
) -> Tensor:
    """out[k] = Σ_t w[segments[k], t] grads[t, k] where kept, 0 elsewhere; how many entries were kept."""
    n = len(out)
    weights = w.tolist()
    drops = Drops(units, numels(out, n), block, mask)
    kept = mask.new_zeros(())
    for k in range(n):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        result = flat(out[k])
        for a in range(0, len(result), WINDOW):
            b = min(a + WINDOW, len(result))
            combine_flat([None if row is None else row[a:b] for row in rows], weights[segments[k]], result[a:b])
            if units[k] >= 0:
                drop = drops.entries(k, a, b - a)
                erase(result[a:b], drop)
                kept += b - a - drop.count_nonzero()
    return kept


def erase(values: Tensor, drop: Tensor) -> None:
    """Put 0 where ``drop`` is true, by the bits: to fill by a mask goes number by number, at a tenth of the speed."""
    bits = _BITS[values.element_size()]
    values.view(bits).bitwise_and_(drop.to(bits).sub_(1))


class Drops:
    """Which entries are dropped. Units are drawn in windows, which tensors that follow each other share."""

    def __init__(self, units: Sequence[int], numels: Sequence[int], block: int, mask: Tensor) -> None:
        self.units, self.block, self.mask = units, block, mask
        self.end = max(u + -(-n // block) for u, n in zip(units, numels, strict=True))
        self.first = 0
        self.window = mask.new_empty(0)

    def entries(self, k: int, start: int, count: int) -> Tensor:
        """(count,) bool, of the entries of tensor k from ``start`` on."""
        first = self.units[k] + start // self.block
        last = self.units[k] + -(-(start + count) // self.block)
        if first < self.first or last > self.first + len(self.window):
            self.first = first // 4 * 4
            self.window = dropped(self.first, max(last, min(self.first + WINDOW, self.end)) - self.first, self.mask)
        units = self.window[first - self.first : last - self.first]
        if self.block == 1:
            return units
        begin = start % self.block
        return units.repeat_interleave(self.block)[begin : begin + count]
