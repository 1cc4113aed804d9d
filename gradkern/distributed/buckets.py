"""Buckets: flat memory for rows, which is cut into one shard for each rank.

A bucket holds whole parameters of one dtype, one after another, as the numbers lie in their memory. Each starts at a
multiple of ``align`` elements, and so does each shard. So kernels load whole vectors, and no unit of a mask is cut.
Gaps are zeros.
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


class Span(NamedTuple):
    """A parameter in a bucket: its place among n parameters, its first element's position, its number of elements."""

    place: int
    start: int
    numel: int


class Piece(NamedTuple):
    """The part of a parameter that is in one rank's shard.

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
        params: the place and the number of elements of each.
        R: the number of ranks.
        align: the number of elements of whose multiples positions are.

    Attributes:
        spans: the parameters.
        shard: the number of elements of each rank's shard.
        size: R times as many.
        gaps: the positions between the parameters, and behind them.
    """

    def __init__(self, dtype: torch.dtype, params: Iterable[tuple[int, int]], R: int, align: int) -> None:
        self.dtype = dtype
        self.spans: list[Span] = []
        end = 0
        for place, numel in params:
            self.spans.append(Span(place, end, numel))
            end += -(-numel // align) * align
        self.shard = -(-end // (R * align)) * align
        self.size = R * self.shard
        starts = [span.start for span in self.spans[1:]] + [self.size]
        ends = [span.start + span.numel for span in self.spans]
        self.gaps = [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


class Buckets:
    """The buckets of some parameters.

    Args:
        places: the parameters' places among all n.
        numels: the numbers of elements of all n.
        dtypes: the dtypes of all n gradients.
        R: the number of ranks.
        align: as for :class:`Bucket`.

    Attributes:
        places: as given.
    """

    def __init__(
        self, places: Sequence[int], numels: Sequence[int], dtypes: Sequence[torch.dtype], R: int, align: int
    ) -> None:
        self.places = places
        self._buckets: list[Bucket] = []
        for dtype in dict.fromkeys(dtypes[k] for k in places):
            of_dtype = [(k, numels[k]) for k in places if dtypes[k] == dtype]
            self._buckets += [Bucket(dtype, full, R, align) for full in _filled(of_dtype, BYTES // dtype.itemsize)]

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    def pieces(self, rank: int) -> list[Piece]:
        """Return the pieces in a rank's shards, in order."""
        return [
            Piece(span.place, number, first - rank * bucket.shard, last - first, first - span.start)
            for number, bucket in enumerate(self._buckets)
            for span in bucket.spans
            for first in [max(span.start, rank * bucket.shard)]
            for last in [min(span.start + span.numel, (rank + 1) * bucket.shard)]
            if first < last
        ]


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
    places: tuple[int, ...], numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...], R: int, unit: int
) -> Buckets:
    """Return the buckets of parameters whose masks have units of ``unit`` elements, 1 without a mask."""
    return Buckets(places, numels, dtypes, R, lcm(ALIGNED, 4 * unit))
