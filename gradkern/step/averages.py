"""Running means of the task gradients, in place of the gradients of a step."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from gradkern.aggregators.history.averaged import Averaged, Part
from gradkern.distributed.comm import Comm
from gradkern.gradients.layouts import PLANS, new_grad_stride
from gradkern.gradients.memory import bools_on
from gradkern.gradients.plan import Arrangement
from gradkern.step.part_rows import PartRows, cut
from gradkern.step.rows import Rows


def averaged(rows: Rows, method: Averaged, present: Sequence[bool], places: Sequence[int]) -> Rows:
    """Move the means of a method by the gradients of shared parameters, and return the rows with them.

    Args:
        rows: the gradients.
        method: the method that keeps the means.
        present: for each task, whether its gradients are of this step.
        places: the place of each of the rows' parameters among those given.
    """
    T, there = rows.n_tasks, None if all(present) else bools_on(present, rows.device)
    uncut = rows.uncut() if isinstance(rows, PartRows) else rows
    columns = uncut.arrangement.shared
    parts = [Part(places[c.place], c.numel, c.dtype) for c in columns]
    memory = method.rows_for(parts, T, rows.device)
    starts = {dtype: method.starts(dtype) for dtype in memory}
    grads = [list(row) for row in uncut.grads]
    into: list[Tensor] = []
    given: list[Tensor] = []
    for c, part in zip(columns, parts, strict=True):
        p, X, start = uncut.params[c.place], memory[c.dtype], starts[c.dtype][part.place]
        shape = (*p.shape, 2) if c.complex else tuple(p.shape)
        for t, g in enumerate(uncut.dense(c)):
            part_of_row = X.as_strided(shape, new_grad_stride(p), t * X.stride(0) + start)
            if g is not None:
                into.append(part_of_row)
                given.append(g)
            grads[t][c.place] = part_of_row
    if into:
        torch._foreach_copy_(into, given)
    agreed = partial(_on_all_ranks, rows.comm) if isinstance(rows, PartRows) else None
    finite = method.move(memory, there, rows.losses, agreed)[1] if memory else None
    of_all_tasks = _of_all_tasks(uncut.arrangement, T)
    if isinstance(rows, PartRows):
        return cut(replace(rows, parts=grads, whole=of_all_tasks, present=there, finite=finite))
    return replace(rows, grads=grads, arrangement=of_all_tasks, present=there, overwrite=False, finite=finite)


def _on_all_ranks(comm: Comm, finite: Tensor) -> Tensor:
    """Return whether a flag (), is set on all ranks."""
    return comm.summed(~finite) == 0


@lru_cache(maxsize=PLANS)
def _of_all_tasks(arrangement: Arrangement, T: int) -> Arrangement:
    """Return the arrangement in which every task has a dense row of every shared parameter."""
    columns = [c if c.segment is None else c._replace(tasks=tuple(range(T)), sparse=False) for c in arrangement.columns]
    return arrangement.of(columns)
