"""Task gradients added up over the backward passes of several micro-batches, for one surgery of their sums."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkern.gradients.losses import Losses, Pass, stacked
from gradkern.gradients.param_grads import added, has_its_memory_alone, readable
from gradkern.info import SurgeryInfo


class Accumulation:
    """Sums of the tasks' gradients, and the result of their surgery; yielded by ``SurgeryOptimizer.accumulate``.

    Attributes:
        info: of the surgery, once the block is left; its ``losses`` are the sums of the micro-batches'. None before,
            and where there was no backward pass.
        values: the sums of the tasks' losses so far, detached; None for a task that has had none.
    """

    def __init__(self) -> None:
        self.info: SurgeryInfo | None = None
        self.values: list[Tensor | None] = []
        self._rows: list[dict[Tensor, Tensor]] = []
        self._broken = False

    @property
    def present(self) -> list[bool]:
        """Which tasks have had a loss."""
        return [loss is not None for loss in self.values]

    def add(self, losses: Losses, targets: Sequence[Tensor]) -> SurgeryInfo:
        """Add the gradients of a micro-batch, and return its losses, with weights of zero: nothing is updated yet.

        Raises:
            ValueError: ``losses`` is of another number of tasks than those before.
            RuntimeError: as :meth:`check`.
        """
        self.check()
        n_tasks = len(losses.present)
        self.expect(n_tasks)
        self._rows = self._rows or [{} for _ in range(n_tasks)]
        for i, found in losses.passes(targets):
            self._broken = True  # if a later pass raises, some tasks' gradients have been added and others' not
            with torch.no_grad():
                _add(self._rows[i], targets, readable(found, targets))
            del found  # not alive beside the next task's
        self._broken = False
        self._add_losses(losses.values)
        return SurgeryInfo(stacked(losses.values, targets[0]), None, torch.zeros(n_tasks, device=targets[0].device))

    def took(self, present: Sequence[bool], info: SurgeryInfo) -> None:
        """Note a micro-batch whose gradients are not added up here, because they are in ``.grad`` already."""
        self._add_losses([loss if here else None for loss, here in zip(info.losses, present, strict=True)])
        self.info = replace(info, losses=stacked(self.values, info.losses))

    def open(self, device: torch.device) -> None:
        """Do nothing: the micro-batches were checked as they came."""

    def check(self) -> None:
        """Raise RuntimeError if a micro-batch has been added in part."""
        if self._broken:
            raise RuntimeError(
                "a backward pass has raised while task gradients were added up, and they are lost: begin anew, with "
                "another accumulate() block or zero_grad()"
            )

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Give away each present task's sums of gradients."""
        for i, loss in enumerate(self.values):
            if loss is not None:
                yield i, [self._rows[i].pop(p, None) for p in targets]

    def expect(self, n_tasks: int) -> None:
        """Raise ValueError if the micro-batches before were of another number of tasks."""
        self.values = self.values or [None] * n_tasks
        if n_tasks != len(self.values):
            raise ValueError(f"losses has {n_tasks} entries; those before in this block had {len(self.values)}")

    def _add_losses(self, values: Sequence[Tensor | None]) -> None:
        for i, value in enumerate(values):
            before = self.values[i]
            if value is not None:
                self.values[i] = value if before is None else before + value


def _add(row: dict[Tensor, Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    times = Counter(id(g) for g in grads)
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        before = row.get(p)
        if before is None:
            # It will be added to in place: so not memory in which another gradient lies too.
            row[p] = g if g.is_sparse or (times[id(g)] == 1 and has_its_memory_alone(g)) else g.clone()
        elif before.is_sparse or g.is_sparse:
            row[p] = added(before, g)
        else:
            before += g
