"""Task gradients added up over the backward passes of several micro-batches, for one surgery of their sums."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkern.gradients.losses import Losses, Pass, stacked
from gradkern.info import SurgeryInfo
from gradkern.step import rows


class Accumulation:
    """What ``SurgeryOptimizer.accumulate`` gives: the tasks' gradients so far, and in the end what came of them.

    Attributes:
        info: of the surgery, once the block is left; its ``losses`` are the sums of the micro-batches'. None before,
            and where there was no backward pass.
    """

    def __init__(self) -> None:
        self.info: SurgeryInfo | None = None
        self._losses: list[Tensor | None] = []
        self._rows: list[dict[Tensor, Tensor]] = []
        self._broken = False

    @property
    def present(self) -> list[bool]:
        """Which tasks have had a loss."""
        return [loss is not None for loss in self._losses]

    def add(self, losses: Losses, targets: Sequence[Tensor]) -> SurgeryInfo:
        """Add the gradients of a micro-batch; its losses, with weights of zero, for nothing is updated yet.

        Raises:
            ValueError: ``losses`` is of another number of tasks than those before.
            RuntimeError: as :meth:`check`.
        """
        self.check()
        n_tasks = len(losses.present)
        self.expect(n_tasks)
        self._rows = self._rows or [{} for _ in range(n_tasks)]
        values: list[Tensor | None] = [None] * n_tasks
        for i, value, found in losses.passes(targets):
            values[i] = value
            self._broken = True  # if a later pass raises, some tasks' gradients have been added and others' not
            with torch.no_grad():
                _add(self._rows[i], targets, rows.readable(found, targets))
            del found  # not alive beside the next task's
        self._broken = False
        self._add_losses(values)
        return SurgeryInfo(stacked(values, targets[0]), None, torch.zeros(n_tasks, device=targets[0].device))

    def took(self, present: Sequence[bool], info: SurgeryInfo) -> None:
        """Note a micro-batch whose gradients were not to be added up here, and are in ``.grad`` already."""
        self._add_losses([loss if here else None for loss, here in zip(info.losses, present, strict=True)])
        self.info = replace(info, losses=stacked(self._losses, info.losses))

    def check(self) -> None:
        """Raise RuntimeError if a micro-batch has been added in part."""
        if self._broken:
            raise RuntimeError(
                "a backward pass has raised while task gradients were added up, and they are lost: begin anew, with "
                "another accumulate() block or zero_grad()"
            )

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Each present task's number, the sum of its losses, and the sums of its gradients, which are given away."""
        for i, loss in enumerate(self._losses):
            if loss is not None:
                yield i, loss, [self._rows[i].pop(p, None) for p in targets]

    def expect(self, n_tasks: int) -> None:
        """Raise ValueError if the micro-batches before were of another number of tasks."""
        self._losses = self._losses or [None] * n_tasks
        if n_tasks != len(self._losses):
            raise ValueError(f"losses has {n_tasks} entries; those before in this block had {len(self._losses)}")

    def _add_losses(self, values: Sequence[Tensor | None]) -> None:
        for i, value in enumerate(values):
            before = self._losses[i]
            if value is not None:
                self._losses[i] = value if before is None else before + value


def _add(row: dict[Tensor, Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    times = Counter(id(g) for g in grads)
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        before = row.get(p)
        if before is None:
            # It will be added to in place: so not memory in which another gradient lies too.
            row[p] = g if g.is_sparse or (times[id(g)] == 1 and rows.has_its_memory_alone(g)) else g.clone()
        elif before.is_sparse or g.is_sparse:
            row[p] = rows.added(before, g)
        else:
            before += g
