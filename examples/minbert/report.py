"""``python -m examples.minbert report``: what runs came to, as the reports' tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.table import digits, scaled
from examples.minbert.outcomes import (
    MEASURES,
    OVER,
    RELATIVE,
    Grid,
    Row,
    experiments,
    found,
    grids,
    labelled,
    mean,
    reported,
    rows,
    shown,
    usual,
    values,
    worded,
)
from examples.minbert.plots import write_plots
from examples.minbert.training import PARTS
from gradkern.demo.results import write_csv

REPORTED_SCORES = (
    ("Rhapsody on a Theme of Gradient Surgery", "PCGrad", "0.511", "0.841", "0.875"),
    ("Unitary Scalarization or Gradient Surgery?", "PCGrad", "0.512", "0.844", "0.614"),
    ("Unitary Scalarization or Gradient Surgery?", "PCGrad", "0.497", "0.855", "0.620"),
    ("Gradient Descent in Multi-Task Learning", "PCGrad", "0.436", "0.373", "0.279"),
    ("Gradient Descent in Multi-Task Learning", "single-task", "0.520", "0.696", "0.286"),
    ("Single Task Pretraining", "pretraining, averaging, PCGrad", "0.528", "0.821", "0.776"),
)
"""On SST, Quora and STS-B, by BERT-base, on dev."""
NONE = "–"
"""Of what there is not."""
LEGEND = """\
Scores are those on dev in the epoch with the best average; of a model for each task, in the best of each. Precision and
recall are means over classes. average: the plain mean of the three. overall: the mean with (r + 1) / 2 for Pearson's r.
conflict: the share of pairs of task gradients, of the whole model, that point against each other. cosine: their mean
cosine, over pairs and steps. ±: standard deviation over seeds. *: a run is not complete."""
TIME_LEGEND = """\
Medians over the steps of a run, of each part by itself; of a model for each task, of a step of each, one after another.
× unitary: relative to unitary scalarization by torch's AdamW in a run that is alike in all else. the report's: relative
to AdamW, as "GradAttention" measured it; of PCGrad "Unitary Scalarization or Gradient Surgery?" says more than twice as
long, with batches halved for memory, and "Single Task Pretraining" 30 minutes an epoch in place of 20. peak: what a
step allocates at the worst moment, and the gradients that are kept for the next one. rows: how much that is over
unitary scalarization's, in gradients of what is trained, in float32."""


def report(paths: Sequence[Path], out: Path) -> str:
    """Read the runs' folders and write ``report.md``, ``runs.csv``, ``epochs.csv`` and PNG figures; the Markdown.

    Args:
        paths: folders of runs, or folders with such in them.
        out: folder that is written to.

    Raises:
        FileNotFoundError: there is no run in one of ``paths``.
        ValueError: no run has finished an epoch, or what is in a folder is no run.
    """
    runs = found(paths)
    if not any(run.told["epochs_log"] for run in runs):
        raise ValueError(f"no run in {', '.join(map(str, paths))} has finished an epoch")
    table = rows(runs)
    out.mkdir(parents=True, exist_ok=True)
    figures = write_plots(out, runs, table)
    text = markdown(table) + "".join(f"\n![{path.stem}]({path.name})\n" for path in figures)
    (out / "report.md").write_text(text, encoding="utf-8")
    write_csv(out / "runs.csv", table)
    write_csv(out / "epochs.csv", [row for run in runs for row in run.epochs()])
    return text


def markdown(rows: Sequence[Row]) -> str:
    """All tables: experiments side by side, then scores, sampling by method, suppression by dropout, and times."""
    parts = ["# Three tasks on one BERT", "## Side by side", side_by_side(rows), "## Scores"]
    for name, of in experiments(rows).items():
        common = ", ".join(worded(choice, value) for choice, value in usual(of).items())
        parts += [f"### {name}", f"Where a line says nothing else: {common}.", _scores(of)]
    parts += [LEGEND, "What the reports have, with BERT-base on SST, Quora and STS-B:"]
    parts.append(_table(["report", "method", "sst", "para", "sts"], REPORTED_SCORES))
    for title, grid in (
        ("## Sampling by method, average / overall", grids(rows, "sampling", "method")),
        ("## Suppression by dropout, average / overall", grids(rows, "suppression", "dropout")),
    ):
        parts += [title] if grid else []
        for of_grid in grid:
            parts += [f"### {of_grid.title}", _grid(of_grid)]
    parts.append("## Time and memory")
    for name, of in experiments(rows).items():
        parts += [f"### {name}", _times(of)]
    return "\n\n".join([*parts, TIME_LEGEND]) + "\n"


def side_by_side(rows: Sequence[Row]) -> str:
    """One line for each trial of all experiments: what it reached, and what its steps cost. The README has it too."""
    columns = {"sst accuracy": 3, "para accuracy": 3, "sts pearson": 3, "average": 3, "overall": 3}
    columns |= {"conflicting pairs": 2, RELATIVE: 2, OVER: 2}
    headings = ["experiment", "method", "sst", "para", "sts", "average", "overall", "conflict", "× unitary", "rows"]
    lines = []
    for name, of in experiments(rows).items():
        trials = (_majority(of, columns), *(_trial(*trial, columns) for trial in labelled(of).items()))
        lines += [[name, *trial] for trial in trials]
    return _table(headings, lines)


def _scores(rows: Sequence[Row]) -> str:
    """A line for each trial of an experiment."""
    several = len({row["seed"] for row in rows}) > 1
    columns = {name: 3 for task, names in MEASURES.items() for name in (f"{task} {name}" for name in names)}
    columns |= {"average": 3, "overall": 3, "best epoch": 0, "conflicting pairs": 2, "mean cosine": 2}
    lines = [_majority(rows, columns), *(_trial(*trial, columns) for trial in labelled(rows).items())]
    if several:
        seeds = (NONE, *(str(len(of)) for of in labelled(rows).values()))
        lines = [[name, n, *cells] for (name, *cells), n in zip(lines, seeds, strict=True)]
    headings = [column.replace("conflicting pairs", "conflict").replace("mean cosine", "cosine") for column in columns]
    return _table(["method", *(["seeds"] if several else []), *headings], lines)


def _trial(label: str, of: Sequence[Row], columns: Mapping[str, int]) -> list[str]:
    """Its name and, to so many places, its numbers."""
    incomplete = "" if all(row["complete"] for row in of) else "*"
    return [label + incomplete, *(_number(values(of, column), places) for column, places in columns.items())]


def _majority(rows: Sequence[Row], columns: Mapping[str, int]) -> list[str]:
    """What has to be beaten: the accuracy of whoever says the same class every time."""
    cells = []
    for column, places in columns.items():
        known = values(rows, column.replace("accuracy", "majority")) if column.endswith("accuracy") else []
        cells.append(_number(known[:1], places))
    return ["most frequent class", *cells]


def _grid(grid: Grid) -> str:
    """A line for each value down; the two overall scores of each cell."""
    (down, lines), (across, columns) = grid.down, grid.across

    def cell(line: Any, column: Any) -> str:
        of = grid.cells.get((line, column))
        return NONE if of is None else " / ".join(_number(values(of, score), 3) for score in ("average", "overall"))

    cells = [[shown(line), *(cell(line, column) for column in columns)] for line in lines]
    return _table([f"{down} by {across}", *map(shown, columns)], cells)


def _times(rows: Sequence[Row]) -> str:
    """A line for each trial of an experiment; beside it what a report measured of that method."""
    columns = ["× unitary", "the report's ×", *(f"{part.replace('_', ', ')}, ms" for part in PARTS), "peak", "rows"]
    lines = []
    for label, of in labelled(rows).items():
        theirs = reported(of[0])
        ms = [mean(values(of, f"{part} ms")) for part in PARTS]
        peak = mean(values(of, "peak bytes"))
        cells = [_number(values(of, RELATIVE), 2), NONE if theirs is None else f"{theirs:g}"]
        cells += [NONE if value is None else digits(value) for value in ms]
        cells += [NONE if peak is None else scaled(peak), _number(values(of, OVER), 2)]
        lines.append([label, *cells])
    return _table(["one step", *columns], lines)


def _number(numbers: Sequence[float], places: int) -> str:
    """The mean, and the standard deviation of several."""
    if not numbers:
        return NONE
    spread = f" ±{stdev(numbers):.{places}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{places}f}{spread}"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])
