"""Figures of a logged run: which tasks' gradients agree, how often they conflict, and the weight of each task.

A run is the sequence of dicts that :meth:`gradkern.SurgeryInfo.scalars` returned step by step, as a list or as a file
of JSON lines. A number under "step" is the number of the step; without it, the place in the sequence is.
``figure.savefig("cosines.png", dpi=150)`` writes a figure.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradkern.arguments import integer

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('gradkern.plots needs matplotlib: pip install "gradkern[demo]"') from error

Row = Mapping[str, float]
Run = Sequence[Row] | str | os.PathLike[str]
Numbers = NDArray[np.float64]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours without the yellow. Colour-blind readers can tell them apart; most differ in grey print."""
STYLES = ("-", "--", ":", "-.")
"""Line styles for runs with more tasks than colours."""


def cosine_matrix(run: Run) -> Figure:
    """Draw a heat map of the mean cosines of all pairs of tasks, with their numbers.

    Blue pairs agree, and red pairs conflict. A pair's mean is over the steps that have its cosine. White is 0. The
    colour scale ends at the largest mean, or at 0.1 if that is larger, so that small cosines stay pale.

    Args:
        run: steps of T >= 2 tasks.

    Raises:
        TypeError, ValueError: ``run`` is not a run, or has no cosines.
    """
    rows = _rows(run)
    names = list(dict.fromkeys(tag.removeprefix("norm/") for row in rows for tag in row if tag.startswith("norm/")))
    means = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            values = _series(rows, f"cosine/{a}-{b}")[1]
            if len(values):
                means[i, j] = means[j, i] = values.mean()
    if np.isnan(means).all():
        raise _nothing("cosine/…", rows)
    limit = max(0.1, float(np.nanmax(np.abs(means))))
    side = 0.62 * len(names)  # inches: a cell holds its number
    figure = Figure(figsize=(side + 2.6, side + 1.6), layout="constrained")
    axes = figure.subplots()
    colors = axes.imshow(np.ma.masked_invalid(means), cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set_facecolor("0.9")  # the diagonal, and pairs that never met
    for (i, j), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            dark = abs(mean) > 0.6 * limit
            axes.text(j, i, f"{mean:z.2f}".replace("-", "−"), ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    over = f"mean of {len(rows):,} logged steps; below 0: conflict"
    axes.set_title(f"Cosines of the task gradients\n{over}", fontsize="medium")
    figure.colorbar(colors, label="mean cosine", shrink=0.9)
    return figure


def conflict_share(run: Run, window: int | None = None) -> Figure:
    """Draw the share of conflicting pairs over the steps: a faint line for each step, and a strong running mean.

    Args:
        run: steps of T >= 2 tasks.
        window: number of logged steps in a running mean, centred, fewer at both ends; None for a twentieth of the run.

    Raises:
        TypeError, ValueError: ``run`` is not a run or has no conflicts, or ``window`` is not a positive integer.
    """
    rows = _rows(run)
    window = _window(window, rows)
    steps, values = _series(rows, "conflict")
    if not len(values):
        raise _nothing("conflict", rows)
    figure, axes = _over_steps("Pairs of tasks in conflict", window)
    _line(axes, steps, 100 * values, window, COLORS[0], STYLES[0], None)
    axes.set_ylabel("conflicting pairs (%)")
    axes.set_ylim(-2, 102)
    return figure


def weights(run: Run, window: int | None = None) -> Figure:
    """Draw the weight of each task's gradient over the steps: a faint line for each step, and a strong running mean.

    Args:
        run: steps of T tasks.
        window: as for :func:`conflict_share`.

    Raises:
        TypeError, ValueError: ``run`` is not a run or has no weights, or ``window`` is not a positive integer.
    """
    rows = _rows(run)
    window = _window(window, rows)
    tags = list(dict.fromkeys(tag for row in rows for tag in row if tag.startswith("weight/")))
    if not tags:
        raise _nothing("weight/…", rows)
    figure, axes = _over_steps("Weights of the task gradients", window, len(tags))
    for k, tag in enumerate(tags):
        color, style = COLORS[k % len(COLORS)], STYLES[k // len(COLORS) % len(STYLES)]
        _line(axes, *_series(rows, tag), window, color, style, tag.removeprefix("weight/"))
    axes.set_ylabel("weight in the update")
    legend_beside(axes)
    return figure


def count_along(axes: Axes, what: str) -> None:
    """Label the x axis ``what``, and put its ticks at whole numbers."""
    axes.set_xlabel(what)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides no line."""
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize="small")


def _over_steps(title: str, window: int, in_legend: int = 0) -> tuple[Figure, Axes]:
    """Return a figure and its axes with steps along x. The figure is high enough for ``in_legend`` lines of legend."""
    figure = Figure(figsize=(7, max(3.6, 0.2 * in_legend + 0.6)), layout="constrained")
    axes = figure.subplots()
    smoothed = "" if window == 1 else f": each logged step, and the running mean of {window:,}"
    axes.set_title(title + smoothed, fontsize="medium")
    axes.grid(alpha=0.3)
    count_along(axes, "step")
    return figure, axes


def _line(axes: Axes, steps: Numbers, values: Numbers, window: int, color: str, style: str, label: str | None) -> None:
    """Draw the running mean, and behind it the values if the mean differs from them."""
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3, zorder=1)
    axes.plot(steps, _running_mean(values, window), style, color=color, linewidth=1.8, label=label)


def _running_mean(values: Numbers, window: int) -> Numbers:
    """Return the mean of the ``window`` values around each value; at both ends of those that exist."""
    centred = slice((window - 1) // 2, (window - 1) // 2 + len(values))
    sums, counts = (np.convolve(v, np.ones(window))[centred] for v in (values, np.ones_like(values)))
    return sums / counts


def _window(window: int | None, rows: Sequence[Row]) -> int:
    if window is None:
        return max(1, len(rows) // 20)
    return integer("window", window, 1)


def _series(rows: Sequence[Row], tag: str) -> tuple[Numbers, Numbers]:
    """Return the steps that have ``tag``, and its values."""
    found = [(row.get("step", place), row[tag]) for place, row in enumerate(rows) if tag in row]
    try:
        steps, values = np.array(found, float).reshape(-1, 2).T
    except (TypeError, ValueError) as error:
        raise ValueError(f"run has a value that is not a number under {tag!r} or 'step': {error}") from error
    return steps, values


def _rows(run: Run) -> list[Row]:
    """Return a run's steps, from its file or from the list itself, each one checked."""
    if isinstance(run, (str, os.PathLike)):
        rows = [_parsed(line, f"{run}:{n}") for n, line in enumerate(Path(run).read_text().splitlines(), start=1)]
    elif isinstance(run, Sequence):
        rows = [_checked(row, f"run[{n}]") for n, row in enumerate(run)]
    else:
        raise TypeError(f"run must be a sequence of dicts, one a step, or a path to a file of them; got {run!r:.200}")
    if not rows:
        raise ValueError(f"run has no steps: {run!r}")
    if len({"step" in row for row in rows}) > 1:
        raise ValueError("run has a 'step' in some of its steps and none in others")
    return rows


def _parsed(line: str, where: str) -> Row:
    try:
        return _checked(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be a line of JSON, got {line!r:.200}") from error


def _checked(row: object, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be a dict, as SurgeryInfo.scalars() gives it; got {row!r:.200}")
    return row


def _nothing(tag: str, rows: Sequence[Row]) -> ValueError:
    tags = ", ".join(sorted({tag for row in rows for tag in row}))
    return ValueError(f"run has no number tagged {tag!r}; its tags are {tags:.200}")
