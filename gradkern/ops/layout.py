"""The virtual flat buffer: gradients stay where autograd left them, and a table of tiles locates them.

A parameter list (or a matrix cut by ``offsets``) is cut into tiles of at most ``TILE`` elements. No tile crosses a
tensor or a segment, so a kernel that works on one tile needs one address per task, one length and one segment
number. Tiles are sorted by segment; the tiles of a segment follow each other. If elements are dropped or kept in
units of ``block`` neighbours, a second table records the unit that each tile starts in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 4096
"""The number of elements of a tile: 16 KB of a float32 row. A tile is large enough that its 32-byte table entry costs
nothing, and small enough that a bias of 768 numbers wastes little of a tile."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables that are the same in every step. Each is copied to a device once."""

    _on_device: dict[tuple[object, ...], tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def is_on(self, device: torch.device) -> bool:
        """Return whether the tables that every use needs are on ``device`` already."""
        return (device,) in self._on_device

    def _once(self, key: tuple[Any, ...], tables: Callable[[], tuple[NDArray[Any], ...]]) -> tuple[Tensor, ...]:
        if key[0].type == "cpu":  # nothing to copy, and FakeTensorMode would leave fake tensors in the cache
            return tuple(torch.from_numpy(table) for table in tables())
        if key not in self._on_device:
            self._on_device[key] = tuple(torch.from_numpy(table).to(key[0]) for table in tables())
        return self._on_device[key]


@dataclass(frozen=True, eq=False)
class Layout(Tables):
    """Tiles over ``n_segments`` segments. Made by :func:`tensor_layout` and :func:`column_layout`.

    Attributes:
        tiles: (n_tiles, 4) int64: tensor number, first element, number of elements, segment.
        bounds: (n_segments + 1,) int64; segment s owns tiles ``bounds[s]:bounds[s + 1]``.
        units: (n_tiles, 2) int64: the unit that a tile starts in, -1 if the tile is not masked, and the number of
            elements of that unit before the tile; no rows if no tensor is masked.
    """

    n_segments: int
    tiles: NDArray[np.int64]
    bounds: NDArray[np.int64]
    units: NDArray[np.int64]

    def pieces(self, size: int | NDArray[np.int64], least: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return pieces, the units of work of a reduction: runs of at most ``size`` tiles of one segment.

        Args:
            size: one number, or one for each segment.
            least: the least number of pieces of a segment; some then have no tiles.

        Returns:
            (n_pieces, 2) int64, first tile and number of tiles; and (n_segments + 1,) int64, the pieces of segment s
            being ``bounds[s]:bounds[s + 1]``.
        """
        sizes = np.broadcast_to(size, (self.n_segments,))
        per_segment = np.maximum(least, -(-np.diff(self.bounds) // sizes))
        bounds = running_totals(per_segment)
        segment = np.repeat(np.arange(self.n_segments), per_segment)
        first = self.bounds[segment] + sizes[segment] * (np.arange(len(segment)) - bounds[segment])
        count = np.minimum(sizes[segment], self.bounds[segment + 1] - first)
        return np.stack((first, count), 1), bounds

    def tiles_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return ``tiles`` and ``units`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.tiles, self.units))

    def pieces_on(self, device: torch.device, size: int) -> tuple[Tensor, ...]:
        """Return :meth:`pieces` on ``device``, copied there once."""
        return self._once((device, size), lambda: self.pieces(size))


@dataclass(frozen=True, eq=False)
class Totals(Tables):
    """The start and the end of each of n consecutive tensors. Made by :func:`totals`.

    Attributes:
        bounds: (n + 1,) int64; tensor k has the positions ``bounds[k]:bounds[k + 1]``.
    """

    bounds: NDArray[np.int64]

    def bounds_on(self, device: torch.device) -> Tensor:
        """Return ``bounds`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.bounds,))[0]


@lru_cache(maxsize=64)
def totals(numels: tuple[int, ...]) -> Totals:
    """Return the bounds of consecutive tensors with ``numels`` elements; cached for the next step."""
    return Totals(running_totals(np.array(numels, dtype=np.int64)))


@lru_cache(maxsize=512)
def tensor_layout(
    numels: tuple[int, ...],
    segments: tuple[int, ...],
    n_segments: int,
    units: tuple[int, ...] | None = None,
    block: int = 1,
) -> Layout:
    """Return the layout of tensors with ``numels`` elements, tensor k in segment ``segments[k]``.

    It is cached for the next step. ``units[k]`` is the number of tensor k's first unit of ``block`` elements, negative
    if tensor k is not masked.

    Raises:
        ValueError: a unit number is not a multiple of 4.
    """
    n = len(numels)
    if units is None:
        return _layout(numels, range(n), (0,) * n, segments, n_segments)
    odd = [u for u in units if u >= 0 and u % 4]
    if odd:
        raise ValueError(f"units must be multiples of 4 or negative, got {odd[0]}")
    layout = _layout(numels, range(n), (0,) * n, segments, n_segments)
    tensor, offset = layout.tiles[:, 0], layout.tiles[:, 1]
    first = np.array(units, dtype=np.int64)[tensor]
    table = np.stack((np.where(first < 0, -1, first + offset // block), offset % block), 1)
    return replace(layout, units=table)


@lru_cache(maxsize=64)
def column_layout(bounds: tuple[int, ...]) -> Layout:
    """Return the cached layout of a matrix whose segment s is the columns ``bounds[s]:bounds[s + 1]``."""
    n = len(bounds) - 1
    return _layout(tuple(np.diff(bounds)), (0,) * n, bounds[:-1], range(n), n)


def _layout(
    numels: Sequence[int], tensors: Sequence[int], starts: Sequence[int], segments: Sequence[int], n_segments: int
) -> Layout:
    """Cut run k, ``numels[k]`` elements of tensor ``tensors[k]`` from ``starts[k]`` on, into tiles of its segment."""
    runs = np.array([numels, tensors, starts, segments], dtype=np.int64)
    numel, tensor, start, segment = runs[:, np.argsort(runs[3], kind="stable")]
    n_tiles = -(-numel // TILE)
    run = np.repeat(np.arange(len(numel)), n_tiles)
    offset = TILE * (np.arange(len(run)) - running_totals(n_tiles)[run])
    length = np.minimum(TILE, numel[run] - offset)
    tiles = np.stack((tensor[run], start[run] + offset, length, segment[run]), 1)
    bounds = running_totals(np.bincount(segment[run], minlength=n_segments))
    return Layout(n_segments, tiles, bounds, np.empty((0, 2), dtype=np.int64))


def running_totals(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 and the running totals of ``counts``."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
