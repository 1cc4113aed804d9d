"""The training loop of a phase: batches from the sampler, losses, surgery, step, and the figures of each step."""

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
from examples.minbert.methods import OPTIMIZERS, SUM, make_recipe
from examples.minbert.schemes import Phase
from examples.minbert.settings import Settings
from gradkern.aggregators import Scalarization
from gradkern.sampling import TaskSampler

WARM_UP = 5
"""Number of first steps of a phase whose times do not count."""
PARTS = ("forward_backward", "surgery", "update", "total")
"""Parts of a step's time."""


class Training:
    """The optimizer and the sampler of a phase, and its training loop.

    Args:
        settings: settings of the run.
        phase: tasks that train, and whether BERT is frozen.
        model: model to train.
        loaders: one for each of ``TASKS``.
    """

    def __init__(
        self, settings: Settings, phase: Phase, model: MultiTask, loaders: Sequence[DataLoader[Batch]]
    ) -> None:
        s, scheme = settings, settings.resolved()
        self.model = model
        self.tasks = [TASKS.index(task) for task in phase.tasks]
        self.amp = s.amp
        self.device = next(model.parameters()).device
        model.freeze_encoder(phase.frozen)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        shared = [p for name, p in trained if not name.startswith("heads.")] or None
        alone = len(self.tasks) == 1
        recipe = SUM if alone or not shared else make_recipe(s.method, s.task_weights, s.suppression, scheme.sampling)
        self.opt = recipe.around(OPTIMIZERS[s.optimizer](trained, scheme.lr), s.seed, self.device, shared)
        self.sampler = TaskSampler(
            [loaders[task] for task in self.tasks],
            "joint" if alone else scheme.sampling,
            epochs=s.epochs,
            steps=s.steps,
            seed=s.seed,
        )
        self.steps_taken = 0
        self.seen: set[int] = set()
        self.memory_measured: set[int] = set()

    def epoch(self) -> Iterator[dict[str, float]]:
        """Take the steps of an epoch, or the rest of them; yield each step's figures under their tags.

        These are the tags of ``SurgeryInfo.scalars``, and "total_loss", the unweighted sum of the losses, left out if
        it is not finite. Most steps have "seconds/part" for each of ``PARTS``. A few have "peak_bytes" instead, which
        includes the gradients kept for the next step.
        """
        for batches in self.sampler:
            scalars = self._step(batches)
            self.steps_taken += 1  # before the yield, after which the state may be saved
            yield scalars

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the model's weights and without the loaders of tasks that do not train."""
        return {
            "optimizer": self.opt.state_dict(),
            "sampler": self.sampler.state_dict(),
            "steps_taken": self.steps_taken,
            "seen": sorted(self.seen),
            "memory_measured": sorted(self.memory_measured),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.opt.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.steps_taken = state["steps_taken"]
        self.seen, self.memory_measured = set(state["seen"]), set(state["memory_measured"])

    def _step(self, batches: Sequence[Batch | None]) -> dict[str, float]:
        losses: list[Any] = [None] * len(TASKS)
        for task, batch in zip(self.tasks, batches, strict=True):
            losses[task] = None if batch is None else partial(self._loss, task, batch)
        infos: list[gk.SurgeryInfo] = []

        def update() -> None:
            # Losses are callables, so that a task's activations are freed before the next forward pass. A weighted sum
            # gets tensors instead, as in ordinary training: autograd adds all tasks in one backward pass.
            one_pass = isinstance(self.opt.aggregator, Scalarization) and self.opt.suppression is None
            given = [loss and loss() for loss in losses] if one_pass else losses
            infos.append(self.opt.update(given))

        if self._measures_memory({task for task, loss in enumerate(losses) if loss is not None}):
            measured: dict[str, float] = {"peak_bytes": peak(update, self.device) + self._kept_bytes()}
        else:
            split = parts(update, self.device, (MultiTask, "loss"))
            both = split["forward"] + split["backward"]  # these alternate, task by task
            seconds = (both, split["surgery"], split["update"], sum(split.values()))
            measured = {f"seconds/{part}": spent for part, spent in zip(PARTS, seconds, strict=True)}
        scalars = infos[0].scalars(TASKS)
        finite = [value for tag, value in scalars.items() if tag.startswith("loss/")]
        present = sum(loss is not None for loss in losses)
        total = {"total_loss": sum(finite)} if len(finite) == present else {}
        # The cosines are those of the whole model's gradients, which makes methods with and without groups comparable.
        cosines = [value for tag, value in scalars.items() if tag.startswith("cosine/")]
        conflict = {"conflict": fmean(cosine < 0 for cosine in cosines)} if cosines else {}
        return total | scalars | conflict | measured

    def _measures_memory(self, present: set[int]) -> bool:
        """Return whether to measure this step's peak memory; its time then does not count.

        The memory is measured once for each task, after all tasks have trained. If a step trains one task, the last
        gradients of all tasks are kept by then.
        """
        self.seen |= present
        if self.steps_taken < WARM_UP or self.seen != set(self.tasks) or present <= self.memory_measured:
            return False
        self.memory_measured |= present
        return True

    def _kept_bytes(self) -> int:
        """Return the bytes of the tasks' last gradients kept between steps, which no step's peak contains."""
        rows = self.opt.state_dict()["surgery"]["memory"] or []
        return sum(g.nbytes for row in rows for g in row if g is not None)

    def _loss(self, task: int, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model.loss(task, batch)
