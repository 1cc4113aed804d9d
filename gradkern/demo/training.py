"""Training of methods side by side on the same seeds, with the measurements that the comparison needs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradkern as gk
from gradkern.aggregators import FAMO, Scalarization
from gradkern.demo.data import Pairs, overlaid_pairs, split_digits
from gradkern.demo.methods import METHODS
from gradkern.demo.model import TASK_PAIRS, TASKS, MultiTaskNet
from gradkern.demo.results import Result
from gradkern.ops.devices import GPU

R = TypeVar("R")


@dataclass(frozen=True)
class Settings:
    """The size of a run.

    Attributes:
        train_pairs, test_pairs: the numbers of pairs of digits.
        probe_every: the number of steps from one probe to the next. Each epoch's first step has a probe.
        warm_up: the number of first steps of a run that no timing counts.
    """

    train_pairs: int = 4096
    test_pairs: int = 2048
    batch_size: int = 64
    learning_rate: float = 4e-3
    probe_every: int = 8
    warm_up: int = 5


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    device: torch.device,
    settings: Settings,
    on_epoch: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Train every method on every seed.

    The methods of a seed take turns epoch by epoch, so that a machine that slows down affects all of them.

    Args:
        methods: names in ``METHODS``.
        seeds: each decides digits, pairs, first weights, batches and all random choices, for all methods alike.
        epochs: the number of passes over the training pairs.
        device: the device to train on.
        settings: the size of a run.
        on_epoch: called after each epoch of each run, while nothing is timed.
    """
    results = []
    with one_thread():
        for seed in seeds:
            data = make_data(seed, settings)
            runs = [Run(method, seed, data, device, settings) for method in methods]
            for _ in range(epochs):
                for run in runs:
                    run.epoch()
                    on_epoch()
            results += [run.result() for run in runs]
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread.

    A second thread saves such small steps a third of their time on an idle machine. If another process wants its core,
    the steps take many times as long, because the threads wait for each other in every layer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_data(seed: int, settings: Settings) -> tuple[Pairs, Pairs]:
    """Return the training and the test pairs of a seed. The single digits are split first, so none is in both."""
    rng = np.random.default_rng(seed)
    train, test = split_digits(rng)
    return overlaid_pairs(train, settings.train_pairs, rng), overlaid_pairs(test, settings.test_pairs, rng)


class Run:
    """Trains one method on one seed. All methods of a seed start from the same weights and see the same batches."""

    def __init__(
        self, method: str, seed: int, data: tuple[Pairs, Pairs], device: torch.device, settings: Settings
    ) -> None:
        self.method, self.seed, self.device, self.settings = method, seed, device, settings
        self.train, self.test = (pairs.to(device) for pairs in data)
        torch.manual_seed(seed)
        self.model = MultiTaskNet().to(device)
        inner = torch.optim.AdamW(self.model.named_parameters(), lr=settings.learning_rate, fused=True)
        recipe = METHODS[method]
        self.opt = recipe.around(inner, seed, device)
        if self.opt.aggregator.is_trained:
            own = self.opt.aggregator.to(device).named_parameters()
            self.opt.add_param_group({"params": list(own), "weight_decay": 0.0})
        self.turns = [[task] for task in range(len(TASKS))] if recipe.memory else [list(range(len(TASKS)))]
        self.batches = torch.Generator().manual_seed(seed)
        # Probes use a method of their own, so that the training's method keeps its random stream and its state.
        self.prober = recipe.around(inner, seed, device)
        self.surgery = not isinstance(self.opt.aggregator, Scalarization)
        self.steps = 0
        self.step_seconds: list[float] = []
        self.surgery_seconds: list[float] = []
        self.losses: list[list[float]] = []
        self.cosines: list[list[float]] = []
        self.conflicting: list[float] = []

    def epoch(self) -> None:
        """Train for one pass over the training pairs."""
        losses, cosines = [], []
        order = torch.randperm(len(self.train.images), generator=self.batches).to(self.device)
        for k, batch in enumerate(order.split(self.settings.batch_size)):
            images, labels = self.train.images[batch], [label[batch] for label in self.train.labels]
            if k % self.settings.probe_every == 0:
                cosines.append(self.probe(images, labels))
            losses.append(self.step(images, labels))
        i, j = zip(*TASK_PAIRS, strict=True)
        of_pairs = torch.stack(cosines)[:, i, j]
        self.losses.append(torch.stack(losses).mean(0).tolist())
        self.cosines.append(of_pairs.mean(0).tolist())
        self.conflicting.append((of_pairs < 0).double().mean().item())

    def step(self, images: Tensor, labels: list[Tensor]) -> Tensor:
        """Train all tasks on one batch, by one update or by one for each task in turn. Return the losses, (T,).

        The time is that of the whole. In turn, each task sees the weights that the task before it has left, so its loss
        needs a forward pass of its own.
        """

        def step() -> list[Tensor]:
            losses = []
            for tasks in self.turns:
                self.opt.zero_grad()
                info = self.opt.backward(only(tasks, self.task_losses(images, labels)))
                self.opt.step()
                if isinstance(self.opt.aggregator, FAMO):
                    self.opt.aggregator.after(self.task_losses(images, labels))
                losses += [info.losses[task] for task in tasks]
            return losses

        seconds, losses = self._timed(step)
        if self.steps >= self.settings.warm_up:
            self.step_seconds.append(seconds)
        self.steps += 1
        return torch.stack(losses)

    def probe(self, images: Tensor, labels: list[Tensor]) -> Tensor:
        """Return the cosines of one batch, (T, T), and time its surgery. The training is not affected.

        The cosines of all methods come from PCGrad's backward pass. So they are of the same steps and cover the whole
        trunk, also for a method that sees only parts of the gradients, or none. The time of surgery is that of the
        method's backward passes less that of one plain ``torch.autograd.grad`` per task on the same graph. It covers
        the Gramian, the weights, the combination, the suppression and all bookkeeping around them. The work that
        ``ConflictLR`` does around the optimizer's step counts in the step's time only.
        """
        losses = self.task_losses(images, labels)
        params = list(self.model.parameters())

        def with_surgery() -> None:
            for tasks in self.turns:
                self.opt.zero_grad()  # as a step does first; the next step clears the .grad that a probe leaves
                self.prober.backward(only(tasks, losses), retain_graph=True)

        def plain() -> None:
            for loss in losses:
                torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)

        if self.surgery:
            # The second one finds warmer caches, so they take turns.
            order = (plain, with_surgery) if len(self.surgery_seconds) % 2 else (with_surgery, plain)
            seconds = {work: self._timed(work)[0] for work in order}
            if self.steps >= self.settings.warm_up:
                self.surgery_seconds.append(seconds[with_surgery] - seconds[plain])
        info = gk.backward(losses, params, aggregator=gk.PCGrad(order=range(len(TASKS))))
        assert info.cosines is not None  # PCGrad sees the task gradients
        return info.cosines

    def task_losses(self, images: Tensor, labels: list[Tensor]) -> list[Tensor]:
        """Return the mean cross-entropy of each task, T scalars of one forward pass."""
        return [cross_entropy(scores, label) for scores, label in zip(self.model(images), labels, strict=True)]

    @torch.no_grad()
    def accuracy(self) -> list[float]:
        """Return the share of test pairs that each task gets right."""
        return [
            (scores.argmax(1) == label).double().mean().item()
            for scores, label in zip(self.model(self.test.images), self.test.labels, strict=True)
        ]

    def result(self) -> Result:
        """Return the results of the run."""
        return Result(
            method=self.method,
            seed=self.seed,
            device=str(self.device),
            accuracy=self.accuracy(),
            losses=self.losses,
            cosines=self.cosines,
            conflicting=float(np.mean(self.conflicting)),
            surgery_ms=1e3 * median(self.surgery_seconds) if self.surgery else None,
            step_ms=1e3 * median(self.step_seconds),
        )

    def _timed(self, work: Callable[[], R]) -> tuple[float, R]:
        start = self._now()
        result = work()
        return self._now() - start, result

    def _now(self) -> float:
        """Return the time in seconds, after the device has finished its work."""
        if self.device.type == GPU:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def only(tasks: Sequence[int], losses: Sequence[Tensor]) -> list[Tensor | None]:
    """Return ``losses`` with None for the tasks that are not in ``tasks``."""
    return [loss if task in tasks else None for task, loss in enumerate(losses)]
