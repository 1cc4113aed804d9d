"""The hook after the rows: means over the ranks, of which each rank gets its shards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.distributed.buckets import Bucket, Buckets
from gradkern.distributed.comm import Comm

Row = Sequence[Tensor | None]


class _Memory:
    """The memory of a reduction.

    Attributes:
        shards: as for :class:`Reduction`.
        staged: for each bucket, what is sent, or put together from shards.
        room: for each bucket, what is received.
    """

    def __init__(self, comm: Comm, buckets: Buckets, T: int, device: torch.device) -> None:
        self.shards = [torch.empty((T, b.shard), dtype=b.dtype, device=device) for b in buckets]
        self.staged = [torch.empty(b.size, dtype=b.dtype, device=device) for b in buckets]
        self.room = [comm.room(staged) for staged in self.staged]


class Reduction:
    """Means over the ranks of T rows. A row's reduction runs while the next task's backward pass does.

    All ranks reduce all rows in the order of tasks. A row that a rank lacks is zeros there.

    On a CPU its memory serves the next step again, because the system clears new memory page by page, which takes as
    long as the messages. Devices have allocators that keep memory.

    Args:
        comm: the ranks.
        buckets: the parameters that are reduced, by their places in the rows.
        T: the number of rows.
        device: the device of the rows.

    Attributes:
        shards: for each bucket, this rank's shards of the means (T, shard), once :meth:`finish` has returned.
    """

    def __init__(self, comm: Comm, buckets: Buckets, T: int, device: torch.device) -> None:
        self.comm = comm
        self.buckets = buckets
        self._key = buckets, T, device
        self._memory: _Memory = comm.taken(self._key) or _Memory(comm, buckets, T, device)
        self.shards, self._staged, self._room = self._memory.shards, self._memory.staged, self._memory.room
        for bucket, staged in zip(buckets, self._staged, strict=True):
            for first, last in bucket.gaps:
                staged[first:last].zero_()
        self._works: list[Any] = [None] * len(buckets)
        self._sent: list[Tensor | None] = [None] * len(buckets)  # kept until they have been sent
        self._rows: dict[int, Row] = {}
        self._T = T
        self._next = 0

    def take(self, t: int, row: Row) -> None:
        """Start the reduction of row ``t`` as soon as those before it have started."""
        self._rows[t] = row
        while self._next in self._rows:
            self._reduce(self._rows.pop(self._next))

    def skip(self, tasks: Sequence[int]) -> None:
        """Let zeros take the place of the rows of some tasks."""
        for t in tasks:
            self.take(t, ())

    def finish(self) -> None:
        """Wait for all reductions; zeros take the place of rows that have not been given."""
        self.skip([t for t in range(self._next, self._T) if t not in self._rows])
        self._wait()

    def combined(self, t: int = 0) -> dict[int, Tensor]:
        """Return row ``t``: vectors by the parameters' places, put together from the ranks' shards.

        Of parameters that are cut by rows they are those of this rank's rows. The memory of the vectors, and of the
        shards, serves until there is another such call, or another reduction of these buckets.
        """
        for k, bucket in enumerate(self.buckets):
            if not bucket.by_rows:
                self._works[k] = self.comm.all_gather(self._staged[k], self.shards[k][t])
        self._wait()
        if self.shards and self.shards[0].device.type == "cpu":  # nothing writes to it any more
            self.comm.keep(self._key, self._memory)
        vectors: dict[int, Tensor] = {}
        for bucket, whole, shards in zip(self.buckets, self._staged, self.shards, strict=True):
            for place, _, start, numel in bucket.runs:
                at = start - self.comm.rank * bucket.shard
                if not bucket.by_rows:
                    vectors[place] = whole[start : start + numel]
                elif 0 <= at < bucket.shard:
                    vectors[place] = shards[t, at : at + numel]
                else:
                    vectors.setdefault(place, shards[t, :0])
        return vectors

    def _reduce(self, row: Row) -> None:
        t, self._next = self._next, self._next + 1
        for number, (bucket, staged) in enumerate(zip(self.buckets, self._staged, strict=True)):
            if self._works[number] is not None:
                self._works[number].wait()
            filled = _filled(staged, bucket, row)
            self._works[number] = self.comm.mean_of_shard(self.shards[number][t], filled, self._room[number])
            self._sent[number] = filled

    def _wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = [None] * len(self._works)
        self._sent = [None] * len(self._sent)


def _filled(staged: Tensor, bucket: Bucket, row: Row) -> Tensor:
    """Return the gradients of a bucket as they lie in memory, with zeros for missing ones.

    They are written to ``staged``, unless the bucket is one gradient, which is a vector already.
    """
    if not row:
        return staged.zero_()
    if len(bucket.runs) == 1 and not bucket.gaps and (g := row[bucket.runs[0].place]) is not None:
        return in_memory(g)
    into, numbers = [], []
    for run in bucket.runs:
        g, part = row[run.place], staged[run.start : run.start + run.numel]
        if g is None:
            part.zero_()
        else:
            into.append(part)
            numbers.append(in_memory(g)[run.offset : run.offset + run.numel])
    if into:
        torch._foreach_copy_(into, numbers)
    return staged


def in_memory(g: Tensor) -> Tensor:
    """Return a dense tensor's numbers in the order in which they lie in memory, as a view."""
    return g.as_strided((g.numel(),), (1,))


def mean_row(comm: Comm, buckets: Buckets, row: Row, device: torch.device) -> dict[int, Tensor]:
    """Return the means over the ranks of a row's gradients, zeros for missing ones, as vectors by their places.

    Of parameters that are cut by rows they are those of this rank's rows.
    """
    reduction = Reduction(comm, buckets, 1, device)
    reduction.take(0, row)
    reduction.finish()
    return reduction.combined()
