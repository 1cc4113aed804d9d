"""Buckets: flat memory for rows, which is cut into one shard for each rank.

A bucket holds whole parameters of one dtype, as the numbers lie in their memory: one after another, or cut by rows such
that each rank's shard has some rows of each. Parameters start at multiples of ``align`` elements, and so do shards. So
kernels load whole vectors, and no unit of a mask is cut where parameters lie one after another. Gaps are zeros.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import torch

BYTES = 25 << 20
"""The size from which on a bucket is full, that of DistributedDataParallel."""
ALIGNED = 8
"""Starts are multiples of so many elements, 16 bytes of the shortest dtype."""


class Run(NamedTuple):
    """Neighbouring elements of a parameter in a bucket.

    Attributes:
        place: the parameter's place among n parameters.
        offset: the position of the first of them in the parameter.
        start: its position in the bucket.
        numel: their number.
    """

    place: int
    offset: int
    start: int
    numel: int


class Piece(NamedTuple):
    """The part of a run that is in one rank's shard.

    Attributes:
        place: the parameter's place.
        bucket: the number of the bucket.
        at: the position of the piece in the shard.
        numel: its number of elements.
        offset: the position of its first element in the parameter.
    """

    place: int
    bucket: int
    at: int
    numel: int
    offset: int


class Bucket:
    """Memory for parameters of one dtype.

    Args:
        dtype: their gradients' dtype.
        runs: where their elements lie, in order of parameters, and of positions in each.
        shard: the number of elements of each rank's shard.
        R: the number of ranks.
        by_rows: whether each rank's shard has some rows of each parameter.

    Attributes:
        dtype, runs, shard, by_rows: as given.
        size: the number of elements of all shards.
        gaps: the positions between the runs, and behind them.
    """

    def __init__(self, dtype: torch.dtype, runs: Sequence[Run], shard: int, R: int, by_rows: bool) -> None:
        self.dtype = dtype
        self.runs = runs
        self.shard = shard
        self.by_rows = by_rows
        self.size = R * shard
        lie = sorted((run.start, run.start + run.numel) for run in runs)
        starts, ends = [first for first, _ in lie] + [self.size], [0] + [last for _, last in lie]
        self.gaps = [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


class Buckets:
    """The buckets of some parameters.

    Args:
        places: the parameters' places among all n.
        sizes: the numbers of elements of all n.
        dtypes: the dtypes of all n gradients.
        rows: the numbers of rows of all n that are cut by rows; 0 for the others, which lie one after another.
        R: the number of ranks.
        align: the number of elements of whose multiples runs start, but for rows within a rank's shard.

    Attributes:
        places: as given.
    """

    def __init__(
        self,
        places: Sequence[int],
        sizes: Sequence[int],
        dtypes: Sequence[torch.dtype],
        rows: Sequence[int],
        R: int,
        align: int,
    ) -> None:
        self.places = places
        self._buckets: list[Bucket] = []
        for dtype, by_rows in dict.fromkeys((dtypes[k], rows[k] > 0) for k in places):
            alike = [(k, sizes[k]) for k in places if (dtypes[k], rows[k] > 0) == (dtype, by_rows)]
            for full in _filled(alike, BYTES // dtype.itemsize):
                cut = _cut_by_rows(full, rows, R, align) if by_rows else _end_to_end(full, R, align)
                self._buckets.append(Bucket(dtype, *cut, R, by_rows))

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    def pieces(self, rank: int) -> list[Piece]:
        """Return the pieces in a rank's shards, in order."""
        return [
            Piece(run.place, number, first - rank * bucket.shard, last - first, run.offset + first - run.start)
            for number, bucket in enumerate(self._buckets)
            for run in bucket.runs
            for first in [max(run.start, rank * bucket.shard)]
            for last in [min(run.start + run.numel, (rank + 1) * bucket.shard)]
            if first < last
        ]


def _end_to_end(params: Iterable[tuple[int, int]], R: int, align: int) -> tuple[list[Run], int]:
    """Return where parameters lie one after another, and the number of elements of a shard."""
    runs, end = [], 0
    for place, numel in params:
        runs.append(Run(place, 0, end, numel))
        end += _up_to(align, numel)
    return runs, _up_to(align, -(-end // R))


def _cut_by_rows(params: Sequence[tuple[int, int]], rows: Sequence[int], R: int, align: int) -> tuple[list[Run], int]:
    """Return where parameters lie of whose rows each rank has as many, the last ones fewer; and the size of a shard."""
    starts, shard = [], 0
    sizes = [numel // rows[place] * -(-rows[place] // R) for place, numel in params]
    for size in sizes:
        starts.append(shard)
        shard += _up_to(align, size)
    return [
        Run(place, offset, offset // size * shard + start, min(size, numel - offset))
        for (place, numel), size, start in zip(params, sizes, starts, strict=True)
        for offset in range(0, numel, size)
    ], shard


def _up_to(multiple: int, n: int) -> int:
    """Return the first multiple of a number from ``n`` on."""
    return -(-n // multiple) * multiple


def _filled(params: Sequence[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the parameters, such that those of a bucket but its last one have less than ``most`` elements."""
    bucket: list[tuple[int, int]] = []
    size = 0
    for place, numel in params:
        bucket.append((place, numel))
        size += numel
        if size >= most:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@lru_cache(maxsize=64)
def buckets_of(
    places: tuple[int, ...],
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    rows: tuple[int, ...],
    R: int,
    unit: int,
) -> Buckets:
    """Return the buckets of parameters whose masks have units of ``unit`` elements, 1 without a mask."""
    return Buckets(places, numels, dtypes, rows, R, lcm(ALIGNED, 4 * unit))
