"""The loop of a phase: batches from the sampler, losses, surgery and step, and what there is to tell of each step."""

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import gradkern as gk
from bench.memory import peak
from bench.step.parts import parts
from examples.minbert.batches import Batch
from examples.minbert.examples import TASKS
from examples.minbert.heads import MultiTask
from examples.minbert.methods import PLAIN
from examples.minbert.schemes import Phase
from gradkern.aggregators import Scalarization
from gradkern.demo.methods import Recipe
from gradkern.sampling import TaskSampler

WARM_UP = 5
"""Steps of a phase before its times count."""
PARTS = ("forward_backward", "surgery", "update", "total")
"""Of a step's time."""
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "gradkern": gk.optim.AdamW}
"""The fused step of either; gradkern's combines the task gradients in it."""


class Training:
    """A phase's optimizer and sampler, around the model.

    Args:
        model: is trained.
        phase: which tasks train, and whether BERT does.
        method: for phases in which two tasks share something.
        optimizer: in ``OPTIMIZERS``.
        lr: its learning rate.
        sampling: of ``TaskSampler``, for phases of several tasks.
        loaders: one for each of ``TASKS``.
        epochs: how many there will be.
        steps: of an epoch; None for as many as the sampler has it.
        amp: forward passes under autocast to bfloat16.
        seed: of all random choices but dropout's.
    """

    def __init__(
        self,
        model: MultiTask,
        phase: Phase,
        method: Recipe,
        optimizer: str,
        lr: float,
        sampling: str,
        loaders: Sequence[DataLoader[Batch]],
        *,
        epochs: int,
        steps: int | None,
        amp: bool,
        seed: int,
    ) -> None:
        self.model = model
        self.tasks = [TASKS.index(task) for task in phase.tasks]
        self.amp = amp
        self.device = next(model.parameters()).device
        model.freeze_encoder(phase.frozen)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        shared = [p for name, p in trained if not name.startswith("heads.")]
        alone = len(self.tasks) == 1
        method = method if shared and not alone else PLAIN
        self.opt = method.around(OPTIMIZERS[optimizer](trained, lr), seed, self.device, shared)
        self.sampler = TaskSampler(
            [loaders[task] for task in self.tasks],
            "joint" if alone else sampling,
            epochs=epochs,
            steps=steps,
            seed=seed,
        )
        self.taken = 0
        self.seen: set[int] = set()
        self.weighed: set[int] = set()

    def epoch(self) -> Iterator[dict[str, float]]:
        """The steps of an epoch, or of the rest of it: what each had to tell, by the tags of ``SurgeryInfo.scalars``.

        And "total_loss", the plain sum of the losses whatever their weights, left out if it is not finite. And of most
        steps "seconds/part" for each part and "total"; of few "peak_bytes" instead, with the gradients that are kept.
        """
        for batches in self.sampler:
            told = self._step(batches)
            self.taken += 1  # before the state can be taken
            yield told

    def state_dict(self) -> dict[str, Any]:
        """All but the model's weights, and the order of the examples whose tasks do not train."""
        return {
            "optimizer": self.opt.state_dict(),
            "sampler": self.sampler.state_dict(),
            "taken": self.taken,
            "seen": sorted(self.seen),
            "weighed": sorted(self.weighed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.opt.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.taken = state["taken"]
        self.seen, self.weighed = set(state["seen"]), set(state["weighed"])

    def _step(self, batches: Sequence[Batch | None]) -> dict[str, float]:
        losses: list[Any] = [None] * len(TASKS)
        for task, batch in zip(self.tasks, batches, strict=True):
            losses[task] = None if batch is None else partial(self._loss, task, batch)
        infos: list[gk.SurgeryInfo] = []

        def update() -> None:
            # Callables, so that a task's activations are freed before the next one's are made; but for a weighted sum
            # tensors, as without any library: one backward pass of all, in which autograd adds up.
            at_once = isinstance(self.opt.aggregator, Scalarization) and self.opt.suppression is None
            given = [loss and loss() for loss in losses] if at_once else losses
            infos.append(self.opt.update(given))

        if self._is_weighed({task for task, loss in enumerate(losses) if loss is not None}):
            measured: dict[str, float] = {"peak_bytes": peak(update, self.device) + self._kept()}
        else:
            found = parts(update, self.device, (MultiTask, "loss"))
            both = found["forward"] + found["backward"]  # which take turns, task by task
            seconds = (both, found["surgery"], found["update"], sum(found.values()))
            measured = {f"seconds/{part}": spent for part, spent in zip(PARTS, seconds, strict=True)}
        told = infos[0].scalars(TASKS)
        of_tasks = [value for tag, value in told.items() if tag.startswith("loss/")]
        present = sum(loss is not None for loss in losses)
        total = {"total_loss": sum(of_tasks)} if len(of_tasks) == present else {}
        # Of the whole model's gradients, so that methods with groups can be compared with those without.
        cosines = [value for tag, value in told.items() if tag.startswith("cosine/")]
        conflict = {"conflict": fmean(cosine < 0 for cosine in cosines)} if cosines else {}
        return total | told | conflict | measured

    def _is_weighed(self, present: set[int]) -> bool:
        """Whether this step's peak memory is measured, which takes time: so theirs does not count.

        It is once for each task, when all have come: where they take turns, all their last gradients are kept by then.
        """
        self.seen |= present
        if self.taken < WARM_UP or self.seen != set(self.tasks) or present <= self.weighed:
            return False
        self.weighed |= present
        return True

    def _kept(self) -> int:
        """Bytes of the tasks' last gradients, where they are kept from step to step: no step allocates those."""
        rows = self.opt.state_dict()["surgery"]["memory"] or []
        return sum(g.nbytes for row in rows for g in row if g is not None)

    def _loss(self, task: int, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model.loss(task, batch)
