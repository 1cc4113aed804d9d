"""What runs left in their folders: a row of numbers for each, and which of them belong together."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, mode
from typing import Any

from examples.minbert.examples import CLASSES, TASKS
from examples.minbert.methods import METHODS
from examples.minbert.schemes import SCHEMES
from examples.minbert.training import OPTIMIZERS, PARTS
from gradkern.sampling import SCHEMES as SAMPLINGS

KINDS = (
    *("scheme", "heads", "similarity", "weights", "data", "epochs", "steps", "batch_sizes", "max_length", "lr"),
    *("judged", "patience", "amp", "device", "machine", "threads"),
)
"""What runs of one experiment have in common."""
CHOICES = ("method", "task_weights", "optimizer", "sampling", "suppression", "dropout")
"""Settings that an experiment compares. Runs that have these in common too differ in their seed."""
LISTED = {
    "scheme": list(SCHEMES),
    "method": list(METHODS),
    "optimizer": list(OPTIMIZERS),
    "sampling": list(SAMPLINGS),
}
"""The order of those that have names."""
CLASSIFIED = ("accuracy", "precision", "recall")
MEASURES = {"sst": CLASSIFIED, "para": CLASSIFIED, "sts": ("pearson",)}
"""Of each task; the first is its score."""
SCORES = (*(f"{task} {MEASURES[task][0]}" for task in TASKS), "average", "overall")
PAIRS = tuple(combinations(TASKS, 2))
RELATIVE, OVER = "step relative to unitary", "rows over unitary"
"""Columns of rows: ratios to the step time of unitary scalarization, and peak memory over its in gradients."""
REPORTED = {"pcgrad": 2.4, "attention": 5.41}
"""How many times as long as AdamW's a step of all tasks took in "GradAttention": its 5.41, and 2.26 times less for
PCGrad."""
NEEDED = (
    *("name", "seed", "complete", *KINDS, *CHOICES, "phases"),
    *("parameters", "trained", "total_loss", "epochs_log", "best", "seconds_per_step", "peak_bytes"),
)
"""Of ``run.json``."""
Row = dict[str, Any]
"""A run's numbers, strings and None by column."""


@dataclass(frozen=True)
class Run:
    """A run's folder, and what its ``run.json`` says."""

    folder: Path
    told: dict[str, Any]

    def trained(self, task: str) -> list[dict[str, Any]]:
        """The epochs that trained ``task``."""
        return [entry for entry in self.told["epochs_log"] if entry["train_loss"][TASKS.index(task)] is not None]

    def epochs(self) -> list[Row]:
        """A row for each: losses, measures on dev and on a part of the training set, cosines."""
        return [
            {
                "name": self.told["name"],
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
            for entry in self.told["epochs_log"]
        ]


def found(paths: Iterable[Path]) -> list[Run]:
    """The runs in the folders, or in folders in them, each once.

    Raises:
        FileNotFoundError: there is none in one of them.
        ValueError: a ``run.json`` is none.
    """
    files: dict[Path, None] = {}
    for path in paths:
        under = sorted(path.rglob("run.json"))
        if not under:
            raise FileNotFoundError(f"no run.json in {path} or in a folder in it")
        files |= dict.fromkeys(file.resolve() for file in under)
    return [Run(file.parent, _read(file)) for file in files]


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each run: the settings, what its best epoch reached, cosines, times and memory.

    Sorted by scheme and method, as ``schemes.py`` and ``methods.py`` list them. None stands for what there is not. Time
    and memory are also told relative to unitary scalarization by torch's AdamW, the mean over its seeds, in runs that
    are alike in all else; in dropout too, whose time on a CPU is not the same at all probabilities.

    Raises:
        ValueError: two runs are of the same settings and the same seed, of which nothing could be told but noise.
    """
    sorted_by = ("scheme", *CHOICES)
    made = sorted((_row(run) for run in runs), key=lambda row: [_place(name, row[name]) for name in sorted_by])
    for same in grouped(made, (*KINDS, *CHOICES, "seed")).values():
        if len(same) > 1:
            raise ValueError(f"{same[0]['folder']} and {same[1]['folder']} are runs of the same settings and seed")

    alike = (*KINDS, "sampling", "dropout", "phases", "parameters")
    plainly = {"method": "unitary", "task_weights": None, "optimizer": "adamw", "suppression": None}
    plain = [row for row in made if all(row[name] == value for name, value in plainly.items())]
    baselines = grouped(plain, alike)
    for row in made:
        base = baselines.get(tuple(row[name] for name in alike), [])
        step, peak = (mean(values(base, column)) for column in ("total ms", "peak bytes"))
        gradient = 4 * row["trained"]  # bytes, in float32
        row[RELATIVE] = None if None in (step, row["total ms"]) else row["total ms"] / step
        row[OVER] = None if None in (peak, row["peak bytes"]) else (row["peak bytes"] - peak) / gradient
    return made


def grouped(rows: Iterable[Row], names: Iterable[str]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values in the columns of those names, in the order of their first."""
    names = tuple(names)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def usual(rows: Sequence[Row]) -> dict[str, Any]:
    """The most frequent value of each choice in an experiment but the method: what a label leaves out."""
    return {name: mode(row[name] for row in rows) for name in CHOICES[1:]}


def labelled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of an experiment by what is compared: the method, and whatever is other than usual."""
    common = usual(rows)
    labels: dict[str, list[Row]] = {}
    for of_trial in grouped(rows, CHOICES).values():
        first = of_trial[0]
        other = [worded(name, first[name]) for name in common if first[name] != common[name]]
        labels[", ".join([first["method"], *other])] = of_trial
    return labels


def experiments(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each experiment, by its scheme and whatever else of ``KINDS`` differs between those of it."""
    made = {}
    for (scheme,), of_scheme in grouped(rows, KINDS[:1]).items():
        differ = [name for name in KINDS[1:] if len({row[name] for row in of_scheme}) > 1]
        for of in grouped(of_scheme, KINDS).values():
            made[", ".join([scheme, *(worded(name, of[0][name]) for name in differ)])] = of
    return made


@dataclass(frozen=True)
class Grid:
    """Runs by two settings, alike in the others.

    Attributes:
        title: what they are alike in, as far as it differs between grids.
        down: one of ``CHOICES``, and its values.
        across: another.
        cells: the runs of two values, where there are any.
    """

    title: str
    down: tuple[str, list[Any]]
    across: tuple[str, list[Any]]
    cells: dict[tuple[Any, ...], list[Row]]


def grids(rows: Sequence[Row], down: str, across: str) -> list[Grid]:
    """One for each value of the other settings at which ``down`` has several, of the runs that have scores."""
    made = []
    for experiment, of in experiments([row for row in rows if row["average"] is not None]).items():
        others = [name for name in CHOICES if name not in (down, across)]
        differ = [name for name in others if len({row[name] for row in of}) > 1]
        for alike in grouped(of, (*others, "phases")).values():
            lines, columns = (
                sorted({row[name] for row in alike}, key=lambda value, name=name: _place(name, value))
                for name in (down, across)
            )
            if len(lines) > 1:
                title = ", ".join([experiment, *(worded(name, alike[0][name]) for name in differ)])
                made.append(Grid(title, (down, lines), (across, columns), grouped(alike, (down, across))))
    return made


def reported(row: Row) -> float | None:
    """What a report measured of such a run's time, relative to AdamW."""
    as_theirs = {"sampling": "joint", "suppression": None, "optimizer": "adamw"}
    alike = all(row[name] == value for name, value in as_theirs.items()) and row["trained"] == row["parameters"]
    return REPORTED.get(row["method"]) if alike else None


def values(rows: Iterable[Row], column: str) -> list[float]:
    """The numbers there are in that column."""
    return [row[column] for row in rows if row[column] is not None]


def shown(value: Any) -> str:
    """A setting's value by itself."""
    return "none" if value is None else str(value)


def worded(name: str, value: Any) -> str:
    """A setting with its name."""
    return f"{name.replace('_', ' ')} {shown(value)}"


def mean(numbers: Sequence[float]) -> float | None:
    """None where there are none."""
    return fmean(numbers) if numbers else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise ValueError(f"{file} does not tell {', '.join(missing)}")
    return found


def _row(run: Run) -> Row:
    told, log = run.told, run.told["epochs_log"]
    best, seconds, weights = told["best"] or {}, told["seconds_per_step"], told["task_weights"]
    judged = {task: _judged(run, task) for task in TASKS}
    return {
        "name": told["name"],
        "folder": str(run.folder),
        **{name: told[name] for name in (*KINDS, *CHOICES)},
        **{name: "/".join(map(str, told[name])) for name in ("heads", "batch_sizes")},
        **{name: told[name] or "all" for name in ("steps", "judged")},
        "task_weights": weights and "/".join(f"{weight:g}" for weight in weights),
        "phases": ", ".join(told["phases"]),
        "seed": told["seed"],
        "complete": told["complete"],
        "parameters": told["parameters"],
        "trained": told["trained"],
        "best epoch": best.get("epoch"),
        **{f"{task} {name}": judged[task].get(name) for task, names in MEASURES.items() for name in names},
        **{f"{task} majority": judged[task].get("majority") for task in CLASSES},
        "average": best.get("average"),
        "overall": best.get("overall"),
        "mean cosine": mean([entry["cosine"] for entry in log if entry["cosine"] is not None]),
        "conflicting pairs": mean([entry["conflict"] for entry in log if entry["conflict"] is not None]),
        **{f"{part} ms": None if seconds[part] is None else 1e3 * seconds[part] for part in PARTS},
        "peak bytes": told["peak_bytes"],
    }


def _judged(run: Run, task: str) -> dict[str, float]:
    """The task's measures in the best epoch; where each task has a model of its own, in that one's best."""
    if run.told["best"] is None:
        return {}
    number = run.told["best"]["epoch"]
    entries = run.trained(task) if number is None else [e for e in run.told["epochs_log"] if e["epoch"] == number]
    judged = (entry["dev"][task] for entry in entries)
    return max(judged, key=lambda found: found[MEASURES[task][0]], default={})  # its losses may all be infinite


def _place(name: str, value: Any) -> float:
    """Of a choice among others: none comes first, and names are in the order in which they are listed."""
    if isinstance(value, str):
        listed = LISTED.get(name, [])
        return listed.index(value) if value in listed else len(listed)
    return -1.0 if value is None else value
