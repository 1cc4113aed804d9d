"""A step's combination by a method that works entry by entry."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from gradkern.aggregators import Entries, Entrywise
from gradkern.gradients.layouts import PLANS, Row
from gradkern.gradients.plan import Arrangement, Column
from gradkern.ops.arguments import TaskGrads
from gradkern.step.rows import Combined, Results, Rows, kept_share, mask_over


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
        self._tasks = _present(rows.arrangement) if rows.present is None else range(rows.n_tasks)
        method.check_tasks(len(self._tasks))

    def combine(self) -> Combined:
        """Return each parameter with its combination; a result overwrites one of its gradients if one is free."""
        rows, arrangement = self.rows, self.rows.arrangement
        positions, present = _positions(arrangement), rows.present
        kept = None if rows.mask is None else rows.mask.state.new_zeros(())
        results = Results(rows)
        for columns, grads in self._batches():
            out = results.memory(columns)
            given = TaskGrads(grads, [0] * len(columns), 1)
            mask = mask_over(columns, rows.mask)
            places = [positions[c.place] for c in columns]
            self.method.combine_entries(Entries(given, places, out, present, mask, kept))
        self.method.advance(rows.params[0])
        unshared = rows.only(c for c in arrangement.columns if c.segment is None)
        ones = torch.ones((rows.n_segments, rows.n_tasks), device=rows.device)
        share = None if kept is None else kept_share(kept, arrangement.shared)
        return [*unshared.combine(ones, None)[0], *results.pairs()], share

    def _batches(self) -> list[tuple[Sequence[Column], Row]]:
        """Return the shared columns in batches of one dtype, each with the gradients of the tasks, row by row."""
        rows, arrangement = self.rows, self.rows.arrangement
        taken = [rows.grads[t] for t in self._tasks]
        batches: list[tuple[Sequence[Column], Row]] = [(b.columns, b.of(taken)) for b in arrangement.products]
        for c in arrangement.shared:
            if c.sparse:
                dense = rows.dense(c)
                batches.append(([c], [dense[t] for t in self._tasks]))
        return batches


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
