"""The results of a comparison as rows of numbers and as CSV files."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradkern.demo.methods import BASELINE
from gradkern.demo.model import TASK_PAIRS, TASKS

Row = dict[str, str | int | float | None]

TASK_NAMES = list(TASKS)
PAIR_NAMES = [f"{TASK_NAMES[i]} / {TASK_NAMES[j]}" for i, j in TASK_PAIRS]


@dataclass(frozen=True)
class Result:
    """Result of one method on one seed.

    Attributes:
        accuracy: (T,), on the test pairs after the last epoch.
        losses: (epochs, T), the mean over an epoch's training steps.
        cosines: (epochs, pairs), the mean over an epoch's probed steps.
        conflicting: the share of pairs with a cosine below zero over the same steps.
        surgery_ms: median time of a step's surgery; None for a method without surgery.
        step_ms: median time of a step: zero_grad, forward, backward with surgery, optimizer. If the tasks train in
            turn, a step is the updates of all tasks on one batch, so every method sees the same data in a step.
    """

    method: str
    seed: int
    device: str
    accuracy: list[float]
    losses: list[list[float]]
    cosines: list[list[float]]
    conflicting: float
    surgery_ms: float | None
    step_ms: float


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per method and seed. Relative times compare with the baseline's run on the same seed, if any."""
    baseline = {r.seed: r.step_ms for r in results if r.method == BASELINE}
    return [
        {
            "method": r.method,
            "seed": r.seed,
            "device": r.device,
            "epochs": len(r.losses),
            **{f"accuracy {name}": value for name, value in zip(TASK_NAMES, r.accuracy, strict=True)},
            "mean accuracy": float(np.mean(r.accuracy)),
            "conflicting pairs": r.conflicting,
            "mean cosine": float(np.mean(r.cosines)),
            "surgery ms": r.surgery_ms,
            "step ms": r.step_ms,
            f"step relative to {BASELINE}": r.step_ms / baseline[r.seed] if baseline else None,
        }
        for r in results
    ]


def epoch_rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per method, seed and epoch: the loss of each task and the cosine of each pair."""
    return [
        {
            "method": r.method,
            "seed": r.seed,
            "epoch": epoch,
            **{f"loss {name}": value for name, value in zip(TASK_NAMES, losses, strict=True)},
            **{f"cosine {name}": value for name, value in zip(PAIR_NAMES, cosines, strict=True)},
        }
        for r in results
        for epoch, (losses, cosines) in enumerate(zip(r.losses, r.cosines, strict=True), start=1)
    ]


def write_csv(path: Path, table: Sequence[Row]) -> None:
    """Write ``table``, whose rows have the same columns; None becomes an empty field."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in table)


def by_method(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the results of each method, in the order in which the methods first appear."""
    grouped: dict[str, list[Result]] = {}
    for r in results:
        grouped.setdefault(r.method, []).append(r)
    return grouped


def ranked(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the results of each method, the one with the highest mean accuracy first."""
    of_methods = by_method(results).items()
    return dict(sorted(of_methods, key=lambda item: -float(np.mean([r.accuracy for r in item[1]]))))


def _text(value: str | int | float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
