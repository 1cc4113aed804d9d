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
from examples.minbert.progress import ProgressBar
from examples.minbert.record import Record, as_json, check_settings
from examples.minbert.schemes import Phase
from examples.minbert.settings import Settings
from examples.minbert.synthetic import synthetic
from examples.minbert.training import Training

CHECKPOINT = "checkpoint.pt"
"""File in a run's folder, until the run is complete."""
TRAIN_EVALUATED = 256
"""Examples of each task's training set that an epoch is evaluated on by default, beside all of dev."""
EVALUATION_BATCH_SIZES = (32, 32, 32)


class Run:
    """One run, new or resumed.

    Args:
        settings: settings of the run.
        out: folder for ``run.json``, ``epochs.csv``, ``steps.jsonl`` and, until the run is complete, ``checkpoint.pt``.
        console: console that shows progress.
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
        self.dev, self.train_part = (
            loaders(_first(examples[split], n), encode, EVALUATION_BATCH_SIZES, None, self.device)
            for split, n in (
                ("dev", settings.judged),
                ("train", max(1, settings.judged // 4) if settings.judged else TRAIN_EVALUATED),
            )
        )
        parameters, in_encoder = (sum(p.numel() for p in module.parameters()) for module in (self.model, encoder))
        trained = parameters - in_encoder * self.scheme.main[0].frozen
        self.record = Record(out, settings, self.scheme, parameters, trained)
        # Phases that train a copy start from the initial weights. The results of the copies are merged: the mean of
        # their encoders, and each copy's own heads.
        self.initial = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.merged: dict[str, Tensor] = {}
        self.phase_index = 0
        self.training = self._training()

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.scheme.phases[self.phase_index]

    def train(self) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed. The checkpoint is then at the end of the current step, or of the
                epoch if it was being evaluated. After a second Ctrl-C it is at the end of the previous epoch.
        """
        progress = ProgressBar(self.console)
        with self.record.writing(), progress.bars, checkpoint.interruptible() as interrupt:
            while True:
                steps = self.settings.epochs * len(self.training.sampler)
                progress.phase(self.phase.name, steps, self.training.steps_taken)
                while not self._phase_ended():
                    for scalars in self.training.epoch():
                        progress.step(self.record.step(self.phase, scalars))
                        if interrupt.requested:
                            self._save()
                            raise KeyboardInterrupt
                    dev, train = evaluate(self.model, self.dev), evaluate(self.model, self.train_part)
                    progress.epoch(self.phase, self.record.epoch(self.phase, dev, train))
                    self._save()
                    if interrupt.requested:
                        raise KeyboardInterrupt
                if self.phase_index + 1 == len(self.scheme.phases):
                    break
                self._begin_next_phase()
        self.record.write(complete=True)
        self.checkpoint.unlink()

    def resume(self) -> None:
        """Load the checkpoint of an interrupted run from the folder.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint has other settings.
        """
        state = checkpoint.load(self.checkpoint)
        check_settings(self.checkpoint, state["settings"], self.settings)
        self.phase_index = state["phase_index"]
        self.merged = {name: p.to(self.device) for name, p in state["merged"].items()}
        self.training = self._training()
        for loader, loader_state in zip(self.loaders, state["loaders"], strict=True):
            loader.generator.set_state(loader_state)
        self.training.load_state_dict(state["training"])
        self.model.load_state_dict(state["model"])
        self.record.resume(state["steps"], state["log"])
        checkpoint.set_rng_state(state["rng"])  # last, because the code above may draw random numbers

    def _save(self) -> None:
        state = {
            "settings": as_json(self.settings),
            "phase_index": self.phase_index,
            "merged": self.merged,
            "loaders": [loader.generator.get_state() for loader in self.loaders],  # including tasks not in training
            "training": self.training.state_dict(),
            "model": self.model.state_dict(),
            "steps": len(self.record.lines),
            "log": self.record.log,
            "rng": checkpoint.rng_state(),
        }
        checkpoint.save(self.checkpoint, state)
        self.record.write(complete=False)

    def _examples(self) -> dict[str, Examples]:
        s = self.settings
        if s.data is None:
            return synthetic(0)  # the same for all seeds, so that their runs are comparable
        on_malformed = partial(self.console.print, markup=False, soft_wrap=True) if s.skip_malformed else None
        return {split: read(Path(s.data), split, on_malformed) for split in ("train", "dev")}

    def _training(self) -> Training:
        """Return the training of the current phase, from the model's current weights."""
        return Training(self.settings, self.phase, self.model, self.loaders)

    @torch.no_grad()
    def _begin_next_phase(self) -> None:
        if self.phase.copy:
            self._merge_copy()
        self.phase_index += 1
        start = self.initial if self.phase.copy else self.merged
        for name, p in self.model.named_parameters():
            p.copy_(start.get(name, p))
        if not self.phase.copy:
            self.merged = {}
        self.training = self._training()

    def _merge_copy(self) -> None:
        """Add the copy's encoder to the mean, and keep its own heads."""
        copies = sum(phase.copy for phase in self.scheme.phases)
        own = tuple(f"heads.{TASKS.index(task)}." for task in self.phase.tasks)
        for name, p in self.model.named_parameters():
            if not name.startswith("heads."):
                self.merged[name] = self.merged.get(name, torch.zeros_like(p)) + p / copies
            elif name.startswith(own):
                self.merged[name] = p.clone()

    def _phase_ended(self) -> bool:
        """Return whether the phase has ended: after all epochs, or ``patience`` epochs without a better score."""
        if self.training.sampler.epoch == self.settings.epochs:
            return True
        if self.settings.patience is None:
            return False
        dev_scores = [asdict(scores(entry["dev"])) for entry in self.record.phase_epochs(self.phase)]
        means = [fmean(each[task] for task in self.phase.tasks) for each in dev_scores]
        return len(means) > self.settings.patience and max(means[: -self.settings.patience]) >= max(means)


def _first(examples: Examples, n: int | None) -> Examples:
    """Return the first n examples of each task, or all, sorted by length so that batches need little padding."""
    return {task: sorted(some[:n], key=lambda e: sum(map(len, e.sentences))) for task, some in examples.items()}
