"""Sums of task gradients over the backward passes of several micro-batches, for one surgery of the sums."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkern.gradients.layouts import Row, layouts_of
from gradkern.gradients.losses import Losses, Pass, stacked
from gradkern.gradients.param_grads import added, owns_its_storage, readable
from gradkern.gradients.parameters import Targets
from gradkern.info import SurgeryInfo


class Accumulation:
    """Sums of the tasks' gradients, and the result of their surgery; yielded by ``SurgeryOptimizer.accumulate``.

    Attributes:
        info: the result of the surgery, once the block is left; its ``losses`` are sums over the micro-batches. None
            before that, and if there was no backward pass.
        values: the sums of the tasks' losses so far, detached; None for a task without a loss so far.
    """

    loss_scale = None
    """As for :class:`gradkern.gradients.losses.Source`."""

    def __init__(self) -> None:
        self.info: SurgeryInfo | None = None
        self.values: list[Tensor | None] = []
        self._rows: list[dict[Tensor, Tensor]] = []
        self._broken = False

    @property
    def present(self) -> list[bool]:
        """A flag for each task: whether it has had a loss."""
        return [loss is not None for loss in self.values]

    @property
    def frozen_grads(self) -> dict[int, dict[Tensor, Tensor]]:
        """By task, the sums for parameters that no :meth:`passes` has asked for, because they are frozen by then."""
        return {i: row for i, row in enumerate(self._rows) if row}

    def add(self, losses: Losses, targets: Targets) -> SurgeryInfo:
        """Add a micro-batch's gradients; return its losses, with zero weights because nothing is updated yet.

        Raises:
            ValueError: ``losses`` has another number of tasks than earlier micro-batches.
            RuntimeError: as :meth:`check`.
        """
        self.check()
        n_tasks = len(losses.present)
        self.expect(n_tasks)
        self._rows = self._rows or [{} for _ in range(n_tasks)]
        for i, grads in losses.passes(targets.tensors):
            self._broken = True  # if a later pass raises, only some tasks' gradients have been added
            with torch.no_grad():
                _add(self._rows[i], targets.tensors, readable(grads, targets.here, targets.layouts))
                if thawed := losses.frozen_grads.pop(i, None):
                    of_thawed = readable([*thawed.values()], [*thawed], layouts_of([*thawed]))
                    _add(self._rows[i], [*thawed], of_thawed)
            del grads  # free them before the next task's pass
        self._broken = False
        self._add_losses(losses.values)
        return SurgeryInfo(
            stacked(losses.values, targets.tensors[0]), None, torch.zeros(n_tasks, device=targets.device)
        )

    def took(self, present: Sequence[bool], info: SurgeryInfo) -> None:
        """Record a micro-batch whose gradients are not added here, because they are already in ``.grad``."""
        self._add_losses([loss if has_loss else None for loss, has_loss in zip(info.losses, present, strict=True)])
        self.info = replace(info, losses=stacked(self.values, info.losses))

    def open(self, device: torch.device) -> None:
        """Do nothing: each micro-batch has been checked already."""

    def check(self) -> None:
        """Raise RuntimeError if a micro-batch has been added only in part."""
        if self._broken:
            raise RuntimeError(
                "a backward pass has raised while task gradients were added up, and they are lost: start again "
                "with another accumulate() block or zero_grad()"
            )

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Yield each present task's number and its sums of gradients, and drop them."""
        for i, loss in enumerate(self.values):
            if loss is not None:
                yield i, [self._rows[i].pop(p, None) for p in targets]

    def expect(self, n_tasks: int) -> None:
        """Set the number of tasks; raise ValueError if earlier micro-batches had another."""
        self.values = self.values or [None] * n_tasks
        if n_tasks != len(self.values):
            raise ValueError(
                f"losses has {n_tasks} entries, and those before in this block had {len(self.values)}: pass None for a "
                "task that is absent"
            )

    def _add_losses(self, values: Sequence[Tensor | None]) -> None:
        for i, value in enumerate(values):
            before = self.values[i]
            if value is not None:
                self.values[i] = value if before is None else before + value


def _add(row: dict[Tensor, Tensor], params: Sequence[Tensor], grads: Row) -> None:
    occurrences = Counter(id(g) for g in grads)
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        before = row.get(p)
        if before is None:
            # Later gradients are added to it in place, so its memory must hold no other gradient.
            row[p] = g if g.is_sparse or (occurrences[id(g)] == 1 and owns_its_storage(g)) else g.clone()
        elif before.is_sparse or g.is_sparse:
            row[p] = added(before, g)
        else:
            before += g
