"""Running means of the task gradients, in place of the gradients of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from gradkern.aggregators.history.averaged import Averaged, Part
from gradkern.gradients.layouts import PLANS, new_grad_stride
from gradkern.gradients.memory import bools_on
from gradkern.gradients.plan import Arrangement
from gradkern.step.rows import Rows


@dataclass(frozen=True)
class AveragedRows(Rows):
    """The T running means of a step's shared parameters, and the gradients of the others.

    Attributes:
        finite: (), whether all gradients behind the means are finite. If not, the Gramian shows it, for the means stay
            as they were.
    """

    finite: Tensor | None = None

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the means; see :meth:`Rows.gramian`."""
        M = super().gramian(unshared)
        return M if self.finite is None else torch.where(self.finite, M, torch.nan)


def averaged(rows: Rows, method: Averaged, present: Sequence[bool], places: Sequence[int]) -> AveragedRows:
    """Move the means of a method by the gradients of shared parameters, and return the rows with them.

    Args:
        rows: the gradients.
        method: the method that keeps the means.
        present: for each task, whether its gradients are of this step.
        places: the place of each of the rows' parameters among those given.
    """
    T, columns = rows.n_tasks, rows.arrangement.shared
    there = None if all(present) else bools_on(present, rows.device)
    parts = [Part(places[c.place], c.numel, c.dtype) for c in columns]
    memory = method.rows_for(parts, T, rows.device)
    starts = {dtype: method.starts(dtype) for dtype in memory}
    grads = [list(row) for row in rows.grads]
    into: list[Tensor] = []
    given: list[Tensor] = []
    for c, part in zip(columns, parts, strict=True):
        p, X, start = rows.params[c.place], memory[c.dtype], starts[c.dtype][part.place]
        shape = (*p.shape, 2) if c.complex else tuple(p.shape)
        for t, g in enumerate(rows.dense(c)):
            part_of_row = X.as_strided(shape, new_grad_stride(p), t * X.stride(0) + start)
            if g is not None:
                into.append(part_of_row)
                given.append(g)
            grads[t][c.place] = part_of_row
    if into:
        torch._foreach_copy_(into, given)
    finite = method.move(memory, there, rows.losses)[1] if memory else None
    own = {f.name: getattr(rows, f.name) for f in fields(rows) if f.init}
    changed = {"grads": grads, "arrangement": _of_all_tasks(rows.arrangement, T), "present": there, "overwrite": False}
    return AveragedRows(**own | changed, finite=finite)


@lru_cache(maxsize=PLANS)
def _of_all_tasks(arrangement: Arrangement, T: int) -> Arrangement:
    """Return the arrangement in which every task has a dense row of every shared parameter."""
    columns = [c if c.segment is None else c._replace(tasks=tuple(range(T)), sparse=False) for c in arrangement.columns]
    return arrangement.of(columns)
