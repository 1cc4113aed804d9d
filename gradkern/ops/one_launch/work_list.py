"""The order of work of the one-launch surgery: the work list gives each ticket of ``kernels/surgery.py`` a piece.

Every segment's tiles are read twice: piece by piece for its Gramian and, once its weights are known, piece by piece
again for the combination. The list is the order of all pieces of all segments:

- A segment's combination follows its Gramian after a fixed number of bytes of other Gramians. With fewer bytes,
  programs would wait for the weights. With more, the rows would have left the cache before the second reading.
- The combination runs backwards, so that the rows read last are read again first. If a segment is larger than the
  cache, this uses the part that is still in it.
- Unshared parameters wait for nothing. Their pieces fill the gap before the last combinations.

A waiting piece waits only for pieces of lower numbers. Programs take tickets in ascending order, so those pieces are
done or belong to running programs: for any number of programs, one of them can continue.
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
        items: (n_items, 4) int64: first tile, number of tiles, segment, and the number of the piece if its Gramian is
            to be computed, or -1 if it is to be combined.
        segments: (S, 3) int64: a segment's first piece, its number of pieces, and its first group of ``FOLD`` pieces.
        n_pieces: the number of pieces of all Gramians.
        n_groups: the number of groups of all segments.
    """

    items: NDArray[np.int64]
    segments: NDArray[np.int64]
    n_pieces: int
    n_groups: int

    def tables_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return ``items`` and ``segments`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.items, self.segments))


@lru_cache(maxsize=64)
def work_list(layout: Layout, T: int, itemsize: int) -> WorkList:
    """Return the work list of T rows of numbers of ``itemsize`` bytes; it is cached for the next step.

    The last segment of ``layout`` holds the unshared parameters. Every other segment has a Gramian; a segment without
    tiles has one piece without tiles, so that its weights are computed like all others'.
    """
    S = layout.n_segments - 1
    tile_bytes = T * TILE * itemsize
    up_to = T * itemsize * running_totals(layout.tiles[:, 2])  # the bytes of the rows before each tile, and of all rows
    segment_ends = up_to[layout.bounds[1:]]
    size = np.where(np.diff(segment_ends, prepend=0) > SMALL_SEGMENT, PIECE, SMALL_PIECE) // tile_bytes
    pieces, bounds = layout.pieces(np.maximum(1, size), least=1)
    counts = np.diff(bounds)
    segment = np.repeat(np.arange(S + 1), counts)

    number = np.arange(len(pieces))
    products = np.column_stack((pieces, segment, number))[: bounds[S]]
    sums = np.column_stack((pieces, segment, np.full_like(number, -1)))[pieces[:, 1] > 0][::-1]
    # The place of each piece in the stream of Gramians, in bytes.
    products_at = up_to[products[:, 0]]
    sums_at = np.append(segment_ends[:S] + LAG[itemsize], up_to[layout.bounds[S]])[sums[:, 2]]
    # Combinations run backwards within a segment; segments at the same place keep their order.
    order = np.lexsort((np.append(products[:, 2], sums[:, 2]), np.append(products_at, sums_at)))
    groups = running_totals(-(-counts[:S] // FOLD))
    segments = np.column_stack((bounds[:S], counts[:S], groups[:-1]))
    return WorkList(np.concatenate((products, sums))[order], segments, int(bounds[S]), int(groups[-1]))
