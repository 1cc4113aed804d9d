"""The order of work of the one-launch surgery: what each ticket of ``kernels/surgery.py`` stands for.

Every segment's tiles are read twice: piece by piece for its Gramian, then, once its weights are known, piece by piece
again to be combined. The list says in which order, for all segments together:

- A segment's combination follows its Gramian by so many bytes of further Gramians. Less, and programs would wait for
  the weights; more, and the rows would have left the cache in which the second reading looks for them.
- It runs backwards, so that what was read last is read again first. Of a segment that is larger than the cache this
  finds what still is in it.
- What is outside surgery waits for nothing. It fills the gap before the last combinations.

A piece that waits, waits for pieces of lower numbers only. Tickets are drawn in ascending order, so those are done or
in the hands of programs that run: whatever the number of programs, one of them can go on.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.kernels.settings import FOLD, LAG, PIECE, SMALL_PIECE, SMALL_SEGMENT
from gradkern.ops.layout import TILE, Layout, Tables, running_totals


@dataclass(frozen=True, eq=False)
class WorkList(Tables):
    """All pieces of work over S segments in the order of their tickets. Made by :func:`work_list`.

    Attributes:
        items: (n_items, 4) int64: first tile, number of tiles, segment, and the number of the piece for which a Gramian
            is to be taken, or -1 to combine.
        segments: (S, 3) int64: a segment's first piece, its number of pieces, and its first group of ``FOLD`` pieces.
        n_pieces: pieces of all Gramians.
        n_groups: groups of all segments.
    """

    items: NDArray[np.int64]
    segments: NDArray[np.int64]
    n_pieces: int
    n_groups: int

    def tables_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """``items`` and ``segments`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.items, self.segments))


@lru_cache(maxsize=64)
def work_list(layout: Layout, T: int, itemsize: int) -> WorkList:
    """The work of T rows of numbers of ``itemsize`` bytes; kept for the next step.

    The last segment of ``layout`` is what is outside surgery. Every other one has a Gramian, of one piece without tiles
    where it has none, so that its weights are computed like all others'.
    """
    S = layout.n_segments - 1
    tile_bytes = T * TILE * itemsize
    up_to = T * itemsize * running_totals(layout.tiles[:, 2])  # bytes of the rows before each tile, and of all
    segment_ends = up_to[layout.bounds[1:]]
    size = np.where(np.diff(segment_ends, prepend=0) > SMALL_SEGMENT, PIECE, SMALL_PIECE) // tile_bytes
    pieces, bounds = layout.pieces(np.maximum(1, size), least=1)
    counts = np.diff(bounds)
    segment = np.repeat(np.arange(S + 1), counts)

    number = np.arange(len(pieces))
    products = np.column_stack((pieces, segment, number))[: bounds[S]]
    sums = np.column_stack((pieces, segment, np.full_like(number, -1)))[pieces[:, 1] > 0][::-1]
    # Where in the stream of Gramians, in bytes, each piece has its place.
    products_at = up_to[products[:, 0]]
    sums_at = np.append(segment_ends[:S] + LAG[itemsize], up_to[layout.bounds[S]])[sums[:, 2]]
    # Backwards within a segment, while segments that are due at the same place keep their order.
    order = np.lexsort((np.append(products[:, 2], sums[:, 2]), np.append(products_at, sums_at)))
    groups = running_totals(-(-counts[:S] // FOLD))
    segments = np.column_stack((bounds[:S], counts[:S], groups[:-1]))
    return WorkList(np.concatenate((products, sums))[order], segments, int(bounds[S]), int(groups[-1]))
