"""Entries of whole parameters, found in the parts that this rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.gradients.sharded import Box
from gradkern.ops.capture import ready
from gradkern.ops.layout import Tables, running_totals


@dataclass(frozen=True, eq=False)
class _Boxes(Tables):
    """K parts in their parameters, which have m dimensions: ones stand before the dimensions of those with fewer.

    Attributes:
        bounds: (K + 1,) int64, where each parameter begins among all of them, one after another.
        starts: (K,) int64, where each part begins among all parts, one after another.
        dimensions: (5, K, m) int64: of each parameter's dimensions the steps in memory and the sizes; of the part the
            first, the sizes, and the steps in its own memory.
    """

    bounds: NDArray[np.int64]
    starts: NDArray[np.int64]
    dimensions: NDArray[np.int64]

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tables on ``device``, copied there once."""
        return self._once((device,), lambda: (self.bounds, self.starts, self.dimensions))


def located(index: Tensor, boxes: tuple[Box, ...]) -> tuple[Tensor, Tensor]:
    """Return where entries of whole parameters lie in the parts of them, and whether they do.

    Args:
        index: (D,) int64, ascending positions in K parameters, one after another as they lie in memory.
        boxes: their parts, one of which has an element at least.

    Returns:
        (D,) int64, ascending positions in the parts, one after another, any for an entry in none; and (D,) bool.
    """
    bounds, starts, dimensions = ready(_boxes(boxes), index.device).on(index.device)
    k = torch.searchsorted(bounds, index, right=True) - 1
    steps, shape, firsts, sizes, steps_here = dimensions[:, k].unbind()
    at = (index - bounds[k]).unsqueeze(1) // steps % shape - firsts
    held = ((at >= 0) & (at < sizes)).all(1)
    positions = starts[k] + (at * steps_here).sum(1)
    return torch.where(held, positions, 0).cummax(0).values, held


@lru_cache(maxsize=64)
def _boxes(boxes: tuple[Box, ...]) -> _Boxes:
    m = max(len(box.shape) for box in boxes)
    rows = []
    for box in boxes:
        more = m - len(box.shape)
        shape, firsts, sizes = (*[1] * more, *box.shape), (*[0] * more, *box.firsts), (*[1] * more, *box.sizes)
        rows.append((_steps(shape), shape, firsts, sizes, _steps(sizes)))
    bounds = running_totals(np.array([prod(box.shape) for box in boxes], dtype=np.int64))
    starts = running_totals(np.array([prod(box.sizes) for box in boxes], dtype=np.int64))[:-1]
    return _Boxes(bounds, starts, np.array(rows, dtype=np.int64).transpose(1, 0, 2).copy())


def _steps(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the steps of a contiguous tensor's dimensions."""
    return tuple([prod(sizes[k + 1 :]) for k in range(len(sizes))])
