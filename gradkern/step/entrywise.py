"""A step's combination by a method that works entry by entry."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gradkern.aggregators import Entries, Entrywise
from gradkern.gradients.layouts import PLANS, Row
from gradkern.gradients.plan import Arrangement, Column
from gradkern.ops.arguments import TaskGrads
from gradkern.step.masked import mask_over
from gradkern.step.rows import Combined, Rows


class EntrywiseRows:
    """The rows of a step for a method that works entry by entry.

    An absent task is left out, except in steps with a memory, where all tasks count. One that counts and does not reach
    a parameter has zeros there. Sparse gradients of shared parameters are made dense. Unshared parameters get the sum
    of their gradients.

    Args:
        rows: the rows.
        method: the method.

    Raises:
        ValueError: the method's arguments do not fit the number of tasks that are not left out.
    """

    def __init__(self, rows: Rows, method: Entrywise) -> None:
        self.rows = rows
        self.method = method
        self._tasks = _present(rows.of_params) if rows.present is None else range(rows.n_tasks)
        self._positions = _positions(rows.of_params)
        method.check_tasks(len(self._tasks))

    def combine(self) -> Combined:
        """Return each parameter with its combination; a result overwrites one of its gradients if one is free."""
        rows, shared = self.rows, self.rows.only(self.rows.of_params.shared)
        results = shared.results()
        counts: list[tuple[int, Tensor]] = []
        for n, some in shared.by_replicas():
            kept = None if rows.mask is None else rows.mask.state.new_zeros(())
            for columns, grads in self._batches(some):
                self._write(columns, grads, results.memory(columns), kept)
            if kept is not None:
                counts.append((n, kept))
        ones = torch.ones((rows.n_segments, rows.n_tasks), device=rows.device)
        self.method.advance(ones)
        unshared = rows.only(c for c in rows.of_params.columns if c.segment is None)
        share = None if rows.mask is None else shared.share_of(counts)
        return [*unshared.combine(ones, None)[0], *results.pairs()], share

    def _batches(self, rows: Rows) -> Iterator[tuple[Sequence[Column], Row]]:
        """Yield the shared columns in batches of one dtype, each with the gradients of the tasks, row by row."""
        taken = [rows.grads[t] for t in self._tasks]
        for batch in rows.arrangement.products:
            yield batch.columns, batch.of(taken)
        for c in rows.arrangement.sparse:
            dense = rows.dense(c)
            yield [c], [dense[t] for t in self._tasks]

    def _write(self, columns: Sequence[Column], grads: Row, out: Sequence[Tensor], kept: Tensor | None) -> None:
        """Write the results of some columns."""
        rows, n = self.rows, len(columns)
        origins = [rows.origin(c) for c in columns]
        positions = [self._positions[place] + first for place, first in origins]
        given, mask = TaskGrads(grads, [0] * n, 1), mask_over(columns, rows.mask)
        self.method.combine_entries(Entries(given, positions, out, rows.present, mask, kept))


@lru_cache(maxsize=PLANS)
def _present(arrangement: Arrangement) -> tuple[int, ...]:
    """Return the tasks that reach any parameter."""
    return tuple(sorted({t for c in arrangement.columns for t in c.tasks}))


@lru_cache(maxsize=PLANS)
def _positions(arrangement: Arrangement) -> dict[int, int]:
    """Return the positions of the shared parameters' first entries, by their places: multiples of 4."""
    shared = arrangement.shared
    fours = accumulate((-(-c.numel // 4) for c in shared), initial=0)
    return {c.place: 4 * first for c, first in zip(shared, fours, strict=False)}
