"""The random choices for each entry, drawn a window at a time: the entries that suppression drops, GradDrop's coins."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradkern.ops.arguments import Mask
from gradkern.ops.philox import dropped

WINDOW = 1 << 18
"""The number of units computed at a time. Their words, 2 MB of int64, are enough for two threads and stay in the caches
of both, and many small tensors share one window. Half as many, which PyTorch gives to one thread, took twice as
long."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def erase(values: Tensor, drop: Tensor) -> None:
    """Set ``values`` to 0 where ``drop`` is true, bit by bit: filling by a mask has a tenth of the speed."""
    bits = _BITS[values.element_size()]
    values.view(bits).bitwise_and_(drop.to(bits).sub_(1))


class Drawn:
    """The numbers of a random stream for consecutive units. It is computed in windows, which later parameters share.

    Args:
        draw: returns what belongs to some units, given the first of them, a multiple of 4, and their number.
        end: the number of units.
    """

    def __init__(self, draw: Callable[[int, int], Tensor], end: int) -> None:
        self._draw = draw
        self._end = end
        self._first = self._last = 0
        self._window: Tensor | None = None

    def units(self, first: int, last: int) -> Tensor:
        """Return what belongs to the units ``first:last``; ``first`` ascends from call to call."""
        if self._window is None or first < self._first or last > self._last:
            self._first = first // 4 * 4
            self._last = max(last, min(self._first + WINDOW, self._end))
            self._window = self._draw(self._first, self._last - self._first)
        return self._window[first - self._first : last - self._first]


class Drops:
    """The dropped entries of some parameters. Units are computed in windows, which later parameters share.

    Args:
        mask: the mask of these parameters.
        numels: the number of elements of each parameter.
    """

    def __init__(self, mask: Mask, numels: list[int]) -> None:
        self.units, self.block, state = mask
        end = max(u + -(-n // self.block) for u, n in zip(self.units, numels, strict=True))
        self._drawn = Drawn(lambda first, n: dropped(first, n, state), end)

    def masks(self, k: int) -> bool:
        """Return whether parameter k is masked."""
        return self.units[k] >= 0

    def entries(self, k: int, start: int, count: int) -> Tensor:
        """Return (count,) bool: whether each entry of parameter k from ``start`` on is dropped."""
        first = self.units[k] + start // self.block
        last = self.units[k] + -(-(start + count) // self.block)
        units = self._drawn.units(first, last)
        if self.block == 1:
            return units
        begin = start % self.block
        return units.repeat_interleave(self.block)[begin : begin + count]

    def erase(self, k: int, start: int, values: Tensor, kept: Tensor | None = None) -> None:
        """Set dropped entries of parameter k to 0 in ``values`` (..., count), its entries from ``start`` on.

        ``kept`` grows by the number of the other entries.
        """
        if self.masks(k):
            drop = self.entries(k, start, values.shape[-1])
            erase(values, drop)
            if kept is not None:
                kept += values.shape[-1] - drop.count_nonzero()
