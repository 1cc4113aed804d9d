"""``python -m examples.minbert report``: tables and figures that compare runs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.table import digits, scaled
from examples.minbert.comparisons import Grid, experiments, grids, labelled, most_frequent, setting_text, value_text
from examples.minbert.outcomes import MEASURES, OVER, RELATIVE, Row, found, mean, reported, rows, values
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
"""Scores that the reports state for SST, Quora and STS-B, with BERT-base, on dev."""
NONE = "–"
"""Text of a missing value."""
LEGEND = """\
Scores are on dev, in the epoch with the best average; with a model for each task, in the best epoch of each. Precision
and recall are means over classes. average: mean of the three scores. overall: the same with (r + 1) / 2 in place of
Pearson's r. conflict: share of the pairs of task gradients, of the whole model, with a negative cosine. cosine: mean
cosine over pairs and steps. ±: standard deviation over seeds. *: incomplete run."""
TIME_LEGEND = """\
Times are medians over the steps of a run, for each part separately; with a model for each task, the sum of one step of
each. × unitary: relative to unitary scalarization with torch's AdamW in a run with the same other settings. the
report's: relative to AdamW, as measured in "GradAttention". For PCGrad, "Unitary Scalarization or Gradient Surgery?"
states more than twice the time, with batches halved for memory, and "Single Task Pretraining" 30 minutes an epoch
instead of 20. peak: most memory that a step allocates, plus the gradients kept for the next step. rows: the difference
to unitary scalarization's peak, in float32 gradients of the trained parameters."""


def report(paths: Sequence[Path], out: Path) -> str:
    """Read the runs, write ``report.md``, ``runs.csv``, ``epochs.csv`` and PNG figures, and return the Markdown.

    Args:
        paths: folders of runs, or folders that contain such.
        out: folder to write to.

    Raises:
        FileNotFoundError: one of ``paths`` contains no run.
        ValueError: no run has finished an epoch, or a ``run.json`` is not one of a run.
    """
    runs = found(paths)
    if not any(run.results["epochs_log"] for run in runs):
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
    """Return all tables: experiments side by side, scores, sampling by method, suppression by dropout, and times."""
    parts = ["# Three tasks on one BERT", "## Side by side", side_by_side(rows), "## Scores"]
    for name, members in experiments(rows).items():
        common = ", ".join(setting_text(choice, value) for choice, value in most_frequent(members).items())
        parts += [f"### {name}", f"Settings of a line that states nothing else: {common}.", _scores(members)]
    parts += [LEGEND, "Scores stated in the reports, with BERT-base on SST, Quora and STS-B:"]
    parts.append(_table(["report", "method", "sst", "para", "sts"], REPORTED_SCORES))
    for title, several in (
        ("## Sampling by method, average / overall", grids(rows, "sampling", "method")),
        ("## Suppression by dropout, average / overall", grids(rows, "suppression", "dropout")),
    ):
        parts += [title] if several else []
        for grid in several:
            parts += [f"### {grid.title}", _grid(grid)]
    parts.append("## Time and memory")
    for name, members in experiments(rows).items():
        parts += [f"### {name}", _times(members)]
    return "\n\n".join([*parts, TIME_LEGEND]) + "\n"


def side_by_side(rows: Sequence[Row]) -> str:
    """Return a table with the scores and the cost of each trial of all experiments. It is also in the README."""
    columns = {"sst accuracy": 3, "para accuracy": 3, "sts pearson": 3, "average": 3, "overall": 3}
    columns |= {"conflicting pairs": 2, RELATIVE: 2, OVER: 2}
    headings = ["experiment", "method", "sst", "para", "sts", "average", "overall", "conflict", "× unitary", "rows"]
    lines = []
    for name, members in experiments(rows).items():
        trials = (_majority(members, columns), *(_trial(*trial, columns) for trial in labelled(members).items()))
        lines += [[name, *trial] for trial in trials]
    return _table(headings, lines)


def _scores(rows: Sequence[Row]) -> str:
    """Return a table of scores with a line for each trial of an experiment."""
    several = len({row["seed"] for row in rows}) > 1
    columns = {name: 3 for task, names in MEASURES.items() for name in (f"{task} {name}" for name in names)}
    columns |= {"average": 3, "overall": 3, "best epoch": 0, "conflicting pairs": 2, "mean cosine": 2}
    lines = [_majority(rows, columns), *(_trial(*trial, columns) for trial in labelled(rows).items())]
    if several:
        seeds = (NONE, *(str(len(trial)) for trial in labelled(rows).values()))
        lines = [[name, n, *cells] for (name, *cells), n in zip(lines, seeds, strict=True)]
    headings = [column.replace("conflicting pairs", "conflict").replace("mean cosine", "cosine") for column in columns]
    return _table(["method", *(["seeds"] if several else []), *headings], lines)


def _trial(label: str, trial: Sequence[Row], columns: Mapping[str, int]) -> list[str]:
    """Return the cells of a trial: its label, and its numbers rounded to the given decimal places."""
    incomplete = "" if all(row["complete"] for row in trial) else "*"
    return [label + incomplete, *(_number(values(trial, column), places) for column, places in columns.items())]


def _majority(rows: Sequence[Row], columns: Mapping[str, int]) -> list[str]:
    """Return the cells of the baseline: the accuracy of always predicting the most frequent class."""
    cells = []
    for column, places in columns.items():
        known = values(rows, column.replace("accuracy", "majority")) if column.endswith("accuracy") else []
        cells.append(_number(known[:1], places))
    return ["most frequent class", *cells]


def _grid(grid: Grid) -> str:
    """Return a table with the two overall scores in each cell of the grid."""
    (down, lines), (across, columns) = grid.down, grid.across

    def cell(line: Any, column: Any) -> str:
        runs = grid.cells.get((line, column))
        return NONE if runs is None else " / ".join(_number(values(runs, score), 3) for score in ("average", "overall"))

    cells = [[value_text(line), *(cell(line, column) for column in columns)] for line in lines]
    return _table([f"{down} by {across}", *map(value_text, columns)], cells)


def _times(rows: Sequence[Row]) -> str:
    """Return a table of times and memory with a line for each trial, including the time that a report measured."""
    columns = ["× unitary", "the report's ×", *(f"{part.replace('_', ', ')}, ms" for part in PARTS), "peak", "rows"]
    lines = []
    for label, trial in labelled(rows).items():
        theirs = reported(trial[0])
        ms = [mean(values(trial, f"{part} ms")) for part in PARTS]
        peak = mean(values(trial, "peak bytes"))
        cells = [_number(values(trial, RELATIVE), 2), NONE if theirs is None else f"{theirs:g}"]
        cells += [NONE if value is None else digits(value) for value in ms]
        cells += [NONE if peak is None else scaled(peak), _number(values(trial, OVER), 2)]
        lines.append([label, *cells])
    return _table(["one step", *columns], lines)


def _number(numbers: Sequence[float], places: int) -> str:
    """Format the mean, with the standard deviation if there are several numbers."""
    if not numbers:
        return NONE
    spread = f" ±{stdev(numbers):.{places}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{places}f}{spread}"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])
