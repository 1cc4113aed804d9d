"""Results of runs, read from their folders: a row of numbers for each run."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.minbert.examples import CLASSES, TASKS
from examples.minbert.methods import METHODS, OPTIMIZERS
from examples.minbert.schemes import SCHEMES
from examples.minbert.training import PARTS
from gradkern.sampling import SCHEMES as SAMPLINGS

KINDS = (
    *("scheme", "heads", "similarity", "weights", "data", "epochs", "steps", "batch_sizes", "max_length", "lr"),
    *("judged", "patience", "amp", "device", "machine", "threads"),
)
"""Settings that all runs of an experiment share."""
CHOICES = ("method", "task_weights", "optimizer", "sampling", "suppression", "dropout")
"""Settings that an experiment compares. Runs that share these too differ only in their seed."""
ORDERS = {
    "scheme": list(SCHEMES),
    "method": list(METHODS),
    "optimizer": list(OPTIMIZERS),
    "sampling": list(SAMPLINGS),
}
"""Order of the settings whose values are names."""
CLASSIFIED = ("accuracy", "precision", "recall")
MEASURES = {"sst": CLASSIFIED, "para": CLASSIFIED, "sts": ("pearson",)}
"""Measures of each task; the first is its score."""
SCORES = (*(f"{task} {MEASURES[task][0]}" for task in TASKS), "average", "overall")
PAIRS = tuple(combinations(TASKS, 2))
RELATIVE, OVER = "step relative to unitary", "rows over unitary"
"""Columns: step time divided by unitary scalarization's, and peak memory minus unitary scalarization's in gradients."""
REPORTED = {"pcgrad": 2.4, "attention": 5.41}
"""Time of a step of all tasks divided by AdamW's, from the report "GradAttention": 5.41 for its method, and 2.26 times
less for PCGrad."""
REQUIRED_KEYS = (
    *("name", "seed", "complete", *KINDS, *CHOICES, "phases"),
    *("parameters", "trained", "total_loss", "epochs_log", "best", "seconds_per_step", "peak_bytes"),
)
"""Required keys of ``run.json``."""
Row = dict[str, Any]
"""A run's numbers, strings and None by column."""


@dataclass(frozen=True)
class Run:
    """A run's folder and the contents of its ``run.json``."""

    folder: Path
    results: dict[str, Any]

    def trained(self, task: str) -> list[dict[str, Any]]:
        """Return the epochs that trained ``task``."""
        return [entry for entry in self.results["epochs_log"] if entry["train_loss"][TASKS.index(task)] is not None]

    def epochs(self) -> list[Row]:
        """Return a row for each epoch: losses, cosines, and measures on dev and on a part of the training set."""
        return [
            {
                "name": self.results["name"],
                "folder": str(self.folder),
                **{
                    name: entry[name] for name in ("phase", "epoch", "step", "average", "overall", "cosine", "conflict")
                },
                **{f"training loss {task}": loss for task, loss in zip(TASKS, entry["train_loss"], strict=True)},
                **{
                    f"{part} {task} {name}": entry[part][task][name]
                    for part in ("dev", "train")
                    for task, names in MEASURES.items()
                    for name in (*names, "loss")
                },
                **{f"cosine {a}-{b}": entry["cosines"].get(f"{a}-{b}") for a, b in PAIRS},
            }
            for entry in self.results["epochs_log"]
        ]


def found(paths: Iterable[Path]) -> list[Run]:
    """Return the runs in the folders and in their subfolders, each once.

    Raises:
        FileNotFoundError: one of the folders has no run.
        ValueError: a ``run.json`` is not one of a run.
    """
    files: dict[Path, None] = {}
    for path in paths:
        under = sorted(path.rglob("run.json"))
        if not under:
            raise FileNotFoundError(f"no run.json in {path} or in its subfolders")
        files |= dict.fromkeys(file.resolve() for file in under)
    return [Run(file.parent, _read(file)) for file in files]


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each run: the settings, the scores of its best epoch, cosines, times and memory.

    Rows are sorted by scheme and method, in the order of ``schemes.py`` and ``methods.py``. Missing values are None.
    Time and memory are also given relative to unitary scalarization by torch's AdamW, the mean over its seeds, in runs
    with the same other settings. These include dropout, because its time on a CPU depends on the probability.

    Raises:
        ValueError: two runs have the same settings and the same seed, so that they differ only by noise.
    """
    sorted_by = ("scheme", *CHOICES)
    made = sorted((_row(run) for run in runs), key=lambda row: [rank(name, row[name]) for name in sorted_by])
    for same in grouped(made, (*KINDS, *CHOICES, "seed")).values():
        if len(same) > 1:
            raise ValueError(f"{same[0]['folder']} and {same[1]['folder']} are runs with the same settings and seed")

    alike = (*KINDS, "sampling", "dropout", "phases", "parameters")
    baseline_settings = {"method": "unitary", "task_weights": None, "optimizer": "adamw", "suppression": None}
    baselines = grouped(
        (row for row in made if all(row[name] == value for name, value in baseline_settings.items())), alike
    )
    for row in made:
        baseline = baselines.get(tuple(row[name] for name in alike), [])
        step, peak = (mean(values(baseline, column)) for column in ("total ms", "peak bytes"))
        gradient = 4 * row["trained"]  # bytes, in float32
        row[RELATIVE] = None if None in (step, row["total ms"]) else row["total ms"] / step
        row[OVER] = None if None in (peak, row["peak bytes"]) else (row["peak bytes"] - peak) / gradient
    return made


def grouped(rows: Iterable[Row], names: Iterable[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Group the rows by their values in the given columns, in order of first appearance."""
    names = tuple(names)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def rank(name: str, value: Any) -> float:
    """Return the sort key of a setting's value: None comes first, and names follow their order in ``ORDERS``."""
    if isinstance(value, str):
        order = ORDERS.get(name, [])
        return order.index(value) if value in order else len(order)
    return -1.0 if value is None else value


def reported(row: Row) -> float | None:
    """Return the relative step time that a report measured for such a run, or None."""
    conditions = {"sampling": "joint", "suppression": None, "optimizer": "adamw"}
    alike = all(row[name] == value for name, value in conditions.items()) and row["trained"] == row["parameters"]
    return REPORTED.get(row["method"]) if alike else None


def values(rows: Iterable[Row], column: str) -> list[float]:
    """Return the numbers in that column, without None."""
    return [row[column] for row in rows if row[column] is not None]


def mean(numbers: Sequence[float]) -> float | None:
    """Return the mean, or None for no numbers."""
    return fmean(numbers) if numbers else None


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    missing = [name for name in REQUIRED_KEYS if name not in results]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return results


def _row(run: Run) -> Row:
    results, log = run.results, run.results["epochs_log"]
    best, seconds, weights = results["best"] or {}, results["seconds_per_step"], results["task_weights"]
    measures = {task: _best_measures(run, task) for task in TASKS}
    return {
        "name": results["name"],
        "folder": str(run.folder),
        **{name: results[name] for name in (*KINDS, *CHOICES)},
        **{name: "/".join(map(str, results[name])) for name in ("heads", "batch_sizes")},
        **{name: results[name] or "all" for name in ("steps", "judged")},
        "task_weights": weights and "/".join(f"{weight:g}" for weight in weights),
        "phases": ", ".join(results["phases"]),
        "seed": results["seed"],
        "complete": results["complete"],
        "parameters": results["parameters"],
        "trained": results["trained"],
        "best epoch": best.get("epoch"),
        **{f"{task} {name}": measures[task].get(name) for task, names in MEASURES.items() for name in names},
        **{f"{task} majority": measures[task].get("majority") for task in CLASSES},
        "average": best.get("average"),
        "overall": best.get("overall"),
        "mean cosine": mean([entry["cosine"] for entry in log if entry["cosine"] is not None]),
        "conflicting pairs": mean([entry["conflict"] for entry in log if entry["conflict"] is not None]),
        **{f"{part} ms": None if seconds[part] is None else 1e3 * seconds[part] for part in PARTS},
        "peak bytes": results["peak_bytes"],
    }


def _best_measures(run: Run, task: str) -> dict[str, float]:
    """Return the task's measures in the best epoch; if each task has its own model, in the best epoch of that one."""
    if run.results["best"] is None:
        return {}
    number = run.results["best"]["epoch"]
    entries = run.trained(task) if number is None else [e for e in run.results["epochs_log"] if e["epoch"] == number]
    measures = (entry["dev"][task] for entry in entries)
    return max(measures, key=lambda found: found[MEASURES[task][0]], default={})  # no epoch had a finite loss
