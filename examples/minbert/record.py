"""The files of a run: steps in ``steps.jsonl``, epochs in ``epochs.csv``, and settings and results in ``run.json``."""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import gradkern
from bench import device
from examples.minbert import outcomes
from examples.minbert.examples import TASKS
from examples.minbert.measures import Measured, Scores, scores
from examples.minbert.schemes import Phase, Scheme
from examples.minbert.settings import Settings
from examples.minbert.training import PARTS, WARM_UP
from gradkern.demo.results import write_csv

STEPS, RUN = "steps.jsonl", "run.json"
Line = dict[str, Any]


class Record:
    """The record of a run, extended while it trains.

    Args:
        out: folder of the run.
        settings: settings of the run.
        scheme: scheme that the settings resolve to.
        parameters: number of the model's parameters.
        trained: number of parameters trained by the scheme's main phases, whose time and memory are reported.

    Attributes:
        lines: a line for each step.
        log: an entry for each epoch.
    """

    def __init__(self, out: Path, settings: Settings, scheme: Scheme, parameters: int, trained: int) -> None:
        self.out, self.settings, self.scheme = out, settings, scheme
        self.parameters, self.trained = parameters, trained
        self.lines: list[Line] = []
        self.log: list[dict[str, Any]] = []

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the file of steps open within the block, truncated to the steps before the resumed one."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.write(complete=False)  # an earlier run here must not count as complete once its steps are overwritten
        _replace(self.out / STEPS, "".join(json.dumps(line) + "\n" for line in self.lines))
        with (self.out / STEPS).open("a", buffering=1) as self._file:
            yield

    def resume(self, steps: int, log: list[dict[str, Any]]) -> None:
        """Resume after ``steps`` steps and the epochs of ``log``.

        Raises:
            ValueError: the file has fewer steps.
        """
        with (self.out / STEPS).open() as file:
            self.lines = [json.loads(line) for line in islice(file, steps)]
        if len(self.lines) < steps:
            raise ValueError(f"{self.out / STEPS} has {len(self.lines)} steps, but the checkpoint has {steps}")
        self.log = log

    def step(self, phase: Phase, scalars: dict[str, float]) -> Line:
        """Add a step; return its line."""
        line = {"step": len(self.lines) + 1, "phase": phase.name, "epoch": len(self.log) + 1, **scalars}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        return line

    def epoch(self, phase: Phase, dev: Measured, train: Measured) -> dict[str, Any]:
        """Add an epoch with its measures; return its entry."""
        epoch = len(self.log) + 1
        lines = [line for line in self.lines if line["epoch"] == epoch]
        dev_scores = scores(dev)
        all_tasks = phase.tasks == TASKS  # otherwise some heads are untrained
        cosines = [value for line in lines for tag, value in line.items() if tag.startswith("cosine/")]
        pairs = {f"{a}-{b}": _mean(lines, f"cosine/{a}-{b}") for a, b in combinations(TASKS, 2)}
        entry = {
            "phase": phase.name,
            "epoch": epoch,
            "step": len(self.lines),
            "train_loss": [_mean(lines, f"loss/{task}") for task in TASKS],
            "dev": dev,
            "train": train,
            "average": dev_scores.average if all_tasks else None,
            "overall": dev_scores.overall if all_tasks else None,
            "cosine": fmean(cosines) if cosines else None,
            "cosines": {pair: cosine for pair, cosine in pairs.items() if cosine is not None},
            "conflict": _mean(lines, "conflict"),
        }
        self.log.append(entry)
        return entry

    def phase_epochs(self, phase: Phase) -> list[dict[str, Any]]:
        """Return the epochs of that phase."""
        return [entry for entry in self.log if entry["phase"] == phase.name]

    def write(self, complete: bool) -> None:
        """Write ``run.json`` and ``epochs.csv`` with the results so far."""
        s, scheme = self.settings, self.scheme
        main = [[line for line in self.lines if line["phase"] == phase.name] for phase in scheme.main]
        seconds = {part: _sum([_median(lines[WARM_UP:], f"seconds/{part}") for lines in main]) for part in PARTS}
        peaks = [line["peak_bytes"] for lines in main for line in lines if "peak_bytes" in line]
        results = {
            "name": self.out.name,
            "scheme": s.scheme,
            "method": s.method,
            "sampling": scheme.sampling,
            "task_weights": s.task_weights,
            "suppression": s.suppression,
            "dropout": s.dropout,
            "optimizer": s.optimizer,
            "weights": s.weights,
            "data": s.data or "synthetic",
            "heads": list(scheme.heads),
            "similarity": scheme.similarity,
            "seed": s.seed,
            "epochs": s.epochs,
            "steps": s.steps,
            "judged": s.judged,
            "patience": s.patience,
            "batch_sizes": list(scheme.batch_sizes),
            "max_length": s.max_length,
            "lr": scheme.lr,
            "device": s.device,
            "machine": device.name(torch.device(s.device)),
            "threads": torch.get_num_threads(),
            "amp": s.amp,
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "gradkern": gradkern.__version__,
            },
            "parameters": self.parameters,
            "trained": self.trained,
            "phases": [phase.name for phase in scheme.phases],
            "total_loss": [line.get("total_loss") for line in self.lines],
            "epochs_log": self.log,
            "best": self._best(),
            "seconds_per_step": seconds,
            "peak_bytes": max(peaks, default=None),
            "settings": as_json(s),
            "complete": complete,
        }
        _replace(self.out / RUN, json.dumps(results, indent=1) + "\n")
        if self.log:
            write_csv(self.out / "epochs.csv", outcomes.Run(self.out, results).epochs())

    def _best(self) -> dict[str, Any] | None:
        """Return the scores of the best epoch by average, among those that train all tasks.

        If no epoch does, return each task's best score, once every task has one.
        """
        phases = [phase for phase in self.scheme.phases if phase.tasks == TASKS]
        entries = [entry for phase in phases for entry in self.phase_epochs(phase)]
        if entries:
            best = max(entries, key=lambda entry: entry["average"])
            return {"epoch": best["epoch"], **_as_dict(scores(best["dev"]))}
        best_scores = {
            task: max(asdict(scores(entry["dev"]))[task] for entry in self.phase_epochs(phase))
            for phase in self.scheme.phases
            for task in phase.tasks
            if self.phase_epochs(phase)
        }
        return {"epoch": None, **_as_dict(Scores(**best_scores))} if len(best_scores) == len(TASKS) else None


def is_complete(out: Path, settings: Settings) -> bool:
    """Return whether the folder has a complete run with these settings.

    Raises:
        ValueError: it has a complete run with other settings.
    """
    if not has_complete(out):
        return False
    check_settings(out / RUN, json.loads((out / RUN).read_text())["settings"], settings)
    return True


def has_complete(out: Path) -> bool:
    """Return whether the folder has a complete run."""
    return (out / RUN).exists() and bool(json.loads((out / RUN).read_text())["complete"])


def check_settings(file: Path, stored: dict[str, Any], settings: Settings) -> None:
    """Raise ValueError unless the settings stored in ``file`` are ``settings``."""
    ours = as_json(settings)
    differ = [f"{name} = {stored.get(name)!r}, not {ours[name]!r}" for name in ours if stored.get(name) != ours[name]]
    if differ:
        raise ValueError(f"{file} belongs to a run with {', '.join(differ)}")


def as_json(settings: Settings) -> dict[str, Any]:
    """Return the settings in the form in which JSON returns them."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def _replace(file: Path, text: str) -> None:
    """Write the file atomically."""
    temporary = file.with_name(f"{file.name}.new")
    temporary.write_text(text)
    os.replace(temporary, file)


def _as_dict(found: Scores) -> dict[str, float]:
    return {"average": found.average, "overall": found.overall, **asdict(found)}


def _mean(lines: Sequence[Line], tag: str) -> float | None:
    """Return the mean over the lines that have the tag, or None."""
    values = [line[tag] for line in lines if tag in line]
    return fmean(values) if values else None


def _median(lines: Sequence[Line], tag: str) -> float | None:
    values = [line[tag] for line in lines if tag in line]
    return median(values) if values else None


def _sum(seconds: Sequence[float | None]) -> float | None:
    """Return the time of one step of each phase, or None if one is unknown."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
