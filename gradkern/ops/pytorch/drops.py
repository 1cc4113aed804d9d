"""The entries that gradient suppression drops, drawn a window of units at a time."""

import torch
from torch import Tensor

from gradkern.ops.arguments import Mask
from gradkern.ops.philox import dropped

WINDOW = 1 << 18
"""Units drawn at a time. Their words, 2 MB of int64, are enough for two threads and stay in the caches of both, and
many small tensors share one drawing. Half as many, which PyTorch gives to one thread, took twice as long."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def erase(values: Tensor, drop: Tensor) -> None:
    """Put 0 where ``drop`` is true, by the bits: filling by a mask goes number by number, at a tenth of the speed."""
    bits = _BITS[values.element_size()]
    values.view(bits).bitwise_and_(drop.to(bits).sub_(1))


class Drops:
    """The dropped entries of some parameters. Units are drawn in windows, which parameters that follow share.

    Args:
        mask: the mask of these parameters.
        numels: the number of elements of each.
    """

    def __init__(self, mask: Mask, numels: list[int]) -> None:
        self.units, self.block, self.state = mask
        self.end = max(u + -(-n // self.block) for u, n in zip(self.units, numels, strict=True))
        self.first = 0
        self.window = self.state.new_empty(0)

    def masks(self, k: int) -> bool:
        """Return whether parameter k is masked at all."""
        return self.units[k] >= 0

    def entries(self, k: int, start: int, count: int) -> Tensor:
        """Return (count,) bool, which entries of parameter k from ``start`` on are dropped."""
        first = self.units[k] + start // self.block
        last = self.units[k] + -(-(start + count) // self.block)
        if first < self.first or last > self.first + len(self.window):
            self.first = first // 4 * 4
            self.window = dropped(self.first, max(last, min(self.first + WINDOW, self.end)) - self.first, self.state)
        units = self.window[first - self.first : last - self.first]
        if self.block == 1:
            return units
        begin = start % self.block
        return units.repeat_interleave(self.block)[begin : begin + count]

    def erase(self, k: int, start: int, values: Tensor, kept: Tensor | None = None) -> None:
        """Put 0 for what is dropped of parameter k, of which ``values`` (..., count) hold the entries from ``start``.

        ``kept`` grows by the number of the other entries.
        """
        if self.masks(k):
            drop = self.entries(k, start, values.shape[-1])
            erase(values, drop)
            if kept is not None:
                kept += values.shape[-1] - drop.count_nonzero()
