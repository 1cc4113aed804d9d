"""A whole run: the model, the phases of its scheme, and an evaluation after each epoch."""

from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from torch import Tensor

from examples.minbert import checkpoint, weights
from examples.minbert.batches import loaders
from examples.minbert.examples import TASKS, Examples
from examples.minbert.files import read
from examples.minbert.heads import MultiTask
from examples.minbert.measures import evaluate, scores
from examples.minbert.methods import chosen
from examples.minbert.progress import Shown
from examples.minbert.record import Record, as_json, refuse_other
from examples.minbert.schemes import Phase
from examples.minbert.settings import Settings
from examples.minbert.synthetic import synthetic
from examples.minbert.training import Training

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, until the run is complete."""
JUDGED = 256
"""Examples of each task's training set that are judged after an epoch, beside all of dev."""
AT_ONCE = (32, 32, 32)
"""Of each task's examples that are judged."""


class Run:
    """One run, new or gone on with.

    Args:
        settings: what it is.
        out: folder for ``run.json``, ``epochs.csv``, ``steps.jsonl`` and, until the run is complete, ``checkpoint.pt``.
        console: is told of progress.
    """

    def __init__(self, settings: Settings, out: Path, console: Console) -> None:
        self.settings, self.console = settings, console
        self.scheme = settings.resolved()
        self.device = torch.device(settings.device)
        self.checkpoint = out / CHECKPOINT
        torch.manual_seed(settings.seed)
        examples = self._examples()
        sentences = chain.from_iterable(e.sentences for task in TASKS for e in examples["train"][task])
        encoder, tokenizer = weights.start(settings.weights, settings.dropout, sentences)
        means = weights.mean_pooled(settings.weights)
        self.model = MultiTask(encoder, self.scheme.heads_by_task, self.scheme.losses, self.scheme.layer, means)
        self.model.to(self.device)
        sizes, encode = self.scheme.batch_sizes, partial(tokenizer.encode, max_length=settings.max_length)
        self.loaders = loaders(examples["train"], encode, sizes, settings.seed, self.device)
        self.dev, self.part = (
            loaders(_first(examples[split], n), encode, AT_ONCE, None, self.device)
            for split, n in (
                ("dev", settings.judged),
                ("train", max(1, settings.judged // 4) if settings.judged else JUDGED),
            )
        )
        parameters, of_encoder = (sum(p.numel() for p in module.parameters()) for module in (self.model, encoder))
        trained = parameters - of_encoder * self.scheme.main[0].frozen
        self.record = Record(out, settings, self.scheme, parameters, trained)
        # The weights of the beginning, and the means of what copies that began with them have become.
        self.first = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.aside: dict[str, Tensor] = {}
        self.number = 0
        self.training = self._training()

    @property
    def phase(self) -> Phase:
        """The present one."""
        return self.scheme.phases[self.number]

    def train(self) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C has come; the checkpoint is of the step that was running then, or of the epoch if
                that was being judged. If a second one has come before, it is of the epoch before.
        """
        shown = Shown(self.console)
        with self.record.writing(), shown.bars, checkpoint.interruptible() as interrupt:
            while True:
                shown.phase(self.phase.name, self.settings.epochs * len(self.training.sampler), self.training.taken)
                while not self._ended():
                    for told in self.training.epoch():
                        line = self.record.step(self.phase, told)
                        shown.step(line)
                        if interrupt.came:
                            self._save()
                            raise KeyboardInterrupt
                    dev, train = evaluate(self.model, self.dev), evaluate(self.model, self.part)
                    shown.epoch(self.phase, self.record.epoch(self.phase, dev, train))
                    self._save()
                    if interrupt.came:
                        raise KeyboardInterrupt
                if self.number + 1 == len(self.scheme.phases):
                    break
                self._begin_next_phase()
        self.record.write(complete=True)
        self.checkpoint.unlink()

    def go_on(self) -> None:
        """Take up what an interrupted run has left in the folder.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of other settings.
        """
        state = checkpoint.load(self.checkpoint)
        refuse_other(self.checkpoint, state["settings"], self.settings)
        self.number = state["number"]
        self.aside = {name: p.to(self.device) for name, p in state["aside"].items()}
        self.training = self._training()
        for loader, random in zip(self.loaders, state["loaders"], strict=True):
            loader.generator.set_state(random)
        self.training.load_state_dict(state["training"])
        self.model.load_state_dict(state["model"])
        self.record.go_on(state["steps"], state["log"])
        checkpoint.set_random(state["random"])  # at the end: what comes before may draw

    def _save(self) -> None:
        state = {
            "settings": as_json(self.settings),
            "number": self.number,
            "aside": self.aside,
            "loaders": [loader.generator.get_state() for loader in self.loaders],  # also of tasks whose phase is over
            "training": self.training.state_dict(),
            "model": self.model.state_dict(),
            "steps": len(self.record.lines),
            "log": self.record.log,
            "random": checkpoint.random(),
        }
        checkpoint.save(self.checkpoint, state)
        self.record.write(complete=False)

    def _examples(self) -> dict[str, Examples]:
        s = self.settings
        if s.data is None:
            return synthetic(0)  # the same for all seeds, so that these are of one experiment
        on_malformed = partial(self.console.print, markup=False, soft_wrap=True) if s.skip_malformed else None
        return {split: read(Path(s.data), split, on_malformed) for split in ("train", "dev")}

    def _training(self) -> Training:
        """The present phase's, from the model as it is."""
        s = self.settings
        return Training(
            self.model,
            self.phase,
            chosen(s.method, s.task_weights, s.suppression, self.scheme.sampling),
            s.optimizer,
            self.scheme.lr,
            self.scheme.sampling,
            self.loaders,
            epochs=s.epochs,
            steps=s.steps,
            amp=s.amp,
            seed=s.seed,
        )

    @torch.no_grad()
    def _begin_next_phase(self) -> None:
        if self.phase.copy:
            self._lay_aside()
        self.number += 1
        begins = self.first if self.phase.copy else self.aside
        for name, p in self.model.named_parameters():
            p.copy_(begins.get(name, p))
        if not self.phase.copy:
            self.aside = {}
        self.training = self._training()

    def _lay_aside(self) -> None:
        """Add the copy's encoder to the mean, and keep its own heads."""
        copies = sum(phase.copy for phase in self.scheme.phases)
        own = tuple(f"heads.{TASKS.index(task)}." for task in self.phase.tasks)
        for name, p in self.model.named_parameters():
            if not name.startswith("heads."):
                self.aside[name] = self.aside.get(name, torch.zeros_like(p)) + p / copies
            elif name.startswith(own):
                self.aside[name] = p.clone()

    def _ended(self) -> bool:
        """Whether the phase has: after all its epochs, or as many as ``patience`` in a row without a better score."""
        if self.training.sampler.epoch == self.settings.epochs:
            return True
        if self.settings.patience is None:
            return False
        found = [asdict(scores(entry["dev"])) for entry in self.record.of_phase(self.phase)]
        reached = [fmean(each[task] for task in self.phase.tasks) for each in found]
        return len(reached) > self.settings.patience and max(reached[: -self.settings.patience]) >= max(reached)


def _first(examples: Examples, n: int | None) -> Examples:
    """The first n of each task, None for all, ordered by length: batches of the equally long have no padding."""
    return {task: sorted(few[:n], key=lambda e: sum(map(len, e.sentences))) for task, few in examples.items()}
