"""What is kept of a run: steps in ``steps.jsonl``, epochs in ``epochs.csv``, and all that follows in ``run.json``."""

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
    """A run's, as it grows.

    Args:
        out: the folder.
        settings: of the run.
        scheme: what they come to.
        parameters: how many numbers the model has.
        trained: how many of them those phases train that times and memory are of.

    Attributes:
        lines: of all steps.
        log: of all epochs.
    """

    def __init__(self, out: Path, settings: Settings, scheme: Scheme, parameters: int, trained: int) -> None:
        self.out, self.settings, self.scheme = out, settings, scheme
        self.parameters, self.trained = parameters, trained
        self.lines: list[Line] = []
        self.log: list[dict[str, Any]] = []

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block the file of steps is open, with those that were taken up to where the run goes on."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.write(complete=False)  # before the steps of a complete run that was here are lost
        _replace(self.out / STEPS, "".join(json.dumps(line) + "\n" for line in self.lines))
        with (self.out / STEPS).open("a", buffering=1) as self._file:
            yield

    def go_on(self, steps: int, log: list[dict[str, Any]]) -> None:
        """After so many steps, and the epochs of ``log``.

        Raises:
            ValueError: the file has fewer steps.
        """
        with (self.out / STEPS).open() as file:
            self.lines = [json.loads(line) for line in islice(file, steps)]
        if len(self.lines) < steps:
            raise ValueError(f"{self.out / STEPS} has {len(self.lines)} steps, the checkpoint is of {steps}")
        self.log = log

    def step(self, phase: Phase, told: dict[str, float]) -> Line:
        """A step has been taken."""
        line = {"step": len(self.lines) + 1, "phase": phase.name, "epoch": len(self.log) + 1, **told}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        return line

    def epoch(self, phase: Phase, dev: Measured, train: Measured) -> dict[str, Any]:
        """An epoch has ended, and been evaluated."""
        epoch = len(self.log) + 1
        lines = [line for line in self.lines if line["epoch"] == epoch]
        found = scores(dev)
        together = phase.tasks == TASKS  # else there are heads that nobody has trained
        cosines = [value for line in lines for tag, value in line.items() if tag.startswith("cosine/")]
        pairs = {f"{a}-{b}": _mean(lines, f"cosine/{a}-{b}") for a, b in combinations(TASKS, 2)}
        entry = {
            "phase": phase.name,
            "epoch": epoch,
            "step": len(self.lines),
            "train_loss": [_mean(lines, f"loss/{task}") for task in TASKS],
            "dev": dev,
            "train": train,
            "average": found.average if together else None,
            "overall": found.overall if together else None,
            "cosine": fmean(cosines) if cosines else None,
            "cosines": {pair: cosine for pair, cosine in pairs.items() if cosine is not None},
            "conflict": _mean(lines, "conflict"),
        }
        self.log.append(entry)
        return entry

    def of_phase(self, phase: Phase) -> list[dict[str, Any]]:
        """The epochs of that phase."""
        return [entry for entry in self.log if entry["phase"] == phase.name]

    def write(self, complete: bool) -> None:
        """``run.json`` and ``epochs.csv``, as far as the run has come."""
        s, scheme = self.settings, self.scheme
        main = [[line for line in self.lines if line["phase"] == phase.name] for phase in scheme.main]
        spent = {part: _together([_median(lines[WARM_UP:], f"seconds/{part}") for lines in main]) for part in PARTS}
        weighed = [line["peak_bytes"] for lines in main for line in lines if "peak_bytes" in line]
        told = {
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
            "seconds_per_step": spent,
            "peak_bytes": max(weighed, default=None),
            "settings": as_json(s),
            "complete": complete,
        }
        _replace(self.out / RUN, json.dumps(told, indent=1) + "\n")
        if self.log:
            write_csv(self.out / "epochs.csv", outcomes.Run(self.out, told).epochs())

    def _best(self) -> dict[str, Any] | None:
        """Of the epochs that train all tasks the one with the best average; else each task's best of its own."""
        phases = [phase for phase in self.scheme.phases if phase.tasks == TASKS]
        entries = [entry for phase in phases for entry in self.of_phase(phase)]
        if entries:
            best = max(entries, key=lambda entry: entry["average"])
            return {"epoch": best["epoch"], **_told(scores(best["dev"]))}
        found = {
            task: max(asdict(scores(entry["dev"]))[task] for entry in self.of_phase(phase))
            for phase in self.scheme.phases
            for task in phase.tasks
            if self.of_phase(phase)
        }
        return {"epoch": None, **_told(Scores(**found))} if len(found) == len(TASKS) else None


def is_complete(out: Path, settings: Settings) -> bool:
    """Whether the folder has that run, at its end.

    Raises:
        ValueError: it has a run of other settings.
    """
    if not has_complete(out):
        return False
    refuse_other(out / RUN, json.loads((out / RUN).read_text())["settings"], settings)
    return True


def has_complete(out: Path) -> bool:
    """Whether the folder has a run, at its end."""
    return (out / RUN).exists() and bool(json.loads((out / RUN).read_text())["complete"])


def refuse_other(file: Path, told: dict[str, Any], settings: Settings) -> None:
    """Raise ValueError unless ``file`` is of a run with these settings, which it tells as JSON has them."""
    ours = as_json(settings)
    differ = [f"{name} = {told.get(name)!r}, not {ours[name]!r}" for name in ours if told.get(name) != ours[name]]
    if differ:
        raise ValueError(f"{file} is of a run with {', '.join(differ)}")


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings, as they come back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def _replace(file: Path, text: str) -> None:
    """Write all of it or nothing."""
    written = file.with_name(f"{file.name}.new")
    written.write_text(text)
    os.replace(written, file)


def _told(found: Scores) -> dict[str, float]:
    return {"average": found.average, "overall": found.overall, **asdict(found)}


def _mean(lines: Sequence[Line], tag: str) -> float | None:
    """Over the lines that have it."""
    values = [line[tag] for line in lines if tag in line]
    return fmean(values) if values else None


def _median(lines: Sequence[Line], tag: str) -> float | None:
    values = [line[tag] for line in lines if tag in line]
    return median(values) if values else None


def _together(seconds: Sequence[float | None]) -> float | None:
    """A step of each phase."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
