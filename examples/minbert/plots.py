"""The figures of a report: scores, grids of two settings, curves over training, and the cost of a step."""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.minbert.comparisons import Grid, experiments, grids, labelled, value_text
from examples.minbert.examples import TASKS
from examples.minbert.outcomes import MEASURES, OVER, PAIRS, RELATIVE, SCORES, Row, Run, grouped, mean, reported, values
from examples.minbert.training import PARTS
from gradkern.plots import COLORS, STYLES, count_along

Series = Callable[[Run], list[float | None]]
"""A run's numbers over time, with None for missing ones."""


def write_plots(folder: Path, runs: Sequence[Run], rows: Sequence[Row]) -> list[Path]:
    """Write a PNG for each figure that has numbers; return the paths."""
    by_folder = {str(run.folder): run for run in runs}
    figures = {"scores": _scores(rows)}
    for name, found in (
        ("sampling", grids(rows, "sampling", "method")),
        ("suppression", grids(rows, "suppression", "dropout")),
    ):
        if found:
            figures[name] = _heat_maps(found)
    for title, family in _families(rows).items():
        trials = {label: [by_folder[row["folder"]] for row in trial] for label, trial in family.items()}
        name = re.sub(r"[^\w.]+", "-", title)
        figures[f"curves-{name}"] = _curves(title, trials)
        if any(_with_cosines(run) for runs in trials.values() for run in runs):
            figures[f"cosines-{name}"] = _cosines(title, trials)
    if values(rows, RELATIVE):
        figures["time"] = _times([row for row in rows if row[RELATIVE] is not None])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return [folder / f"{name}.png" for name in figures]


def _families(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group trials into figures with few lines: one for all methods, and one for the variants of each method."""
    families: dict[str, dict[str, list[Row]]] = {}
    for title, members in experiments(rows).items():
        by_method: dict[str, dict[str, list[Row]]] = {method: {} for (method,) in grouped(members, ("method",))}
        for label, trial in labelled(members).items():
            by_method[trial[0]["method"]][label] = trial
        families[title] = {}
        for method, trials in by_method.items():
            first = method if method in trials else next(iter(trials))
            families[title][first] = trials[first]
        families |= {f"{title}, {method}": trials for method, trials in by_method.items() if len(trials) > 1}
    return families


def _scores(rows: Sequence[Row]) -> Figure:
    """Plot a row of panels for each experiment: a dot per seed, a diamond for the mean, a line at unitary's mean."""
    by_title = {title: labelled(members) for title, members in experiments(rows).items()}
    figure, grid = _panels([len(trials) for trials in by_title.values()], [1] * len(SCORES), 2.6)
    for panels, (title, trials) in zip(grid, by_title.items(), strict=True):
        for axes, column in zip(panels, SCORES, strict=True):
            for place, trial in enumerate(trials.values()):
                found = values(trial, column)
                axes.plot(found, [place] * len(found), "o", color=COLORS[0], alpha=0.4, markersize=4, markeredgewidth=0)
                if found:
                    axes.plot(mean(found), place, "D", color=COLORS[0], markersize=4)
            unitary = mean(values(trials.get("unitary", []), column))
            if unitary is not None:
                axes.axvline(unitary, color="0.5", linewidth=0.8, zorder=0)
            axes.set_title(column, fontsize="small")
            axes.grid(axis="x", alpha=0.3)
        _name_lines(panels, list(trials), title)
    figure.suptitle("Scores on dev in the best epoch", fontsize="medium")
    return figure


def _heat_maps(found: Sequence[Grid]) -> Figure:
    """Plot a heat map of the average score for each grid, with the digits, and a dash for a missing run."""
    wide = max(len(grid.across[1]) for grid in found)
    figure = Figure(
        figsize=(2.5 + 0.9 * wide, sum(1.9 + 0.45 * len(grid.down[1]) for grid in found)), layout="constrained"
    )
    heights = [1 + len(grid.down[1]) for grid in found]
    for axes, grid in zip(figure.subplots(len(found), squeeze=False, height_ratios=heights)[:, 0], found, strict=True):
        (down, lines), (across, columns) = grid.down, grid.across
        averages = np.array(
            [[mean(values(grid.cells.get((a, b), []), "average")) for b in columns] for a in lines], float
        )
        least, most = np.nanmin(averages), np.nanmax(averages)
        middle, half = (least + most) / 2, max(0.05, (most - least) / 2)  # small differences get similar colours
        axes.imshow(np.ma.masked_invalid(averages), "Blues", aspect="auto", vmin=middle - half, vmax=middle + half)
        axes.set_facecolor("0.95")
        for (i, j), average in np.ndenumerate(averages):
            digits = "–" if np.isnan(average) else f"{average:.3f}"
            color = "w" if average > middle + half / 3 else "k"
            axes.text(j, i, digits, ha="center", va="center", color=color, fontsize="small")
        rotation = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if across == "method" else {}
        axes.set_xticks(range(len(columns)), [value_text(value) for value in columns], fontsize="small", **rotation)
        axes.set_yticks(range(len(lines)), [value_text(value) for value in lines], fontsize="small")
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(grid.title, fontsize="medium")
    figure.suptitle("Average score on dev in the best epoch", fontsize="medium")
    return figure


def _curves(title: str, trials: dict[str, list[Run]]) -> Figure:
    """Plot the total loss by step, and each task's score by epoch: dev above, a part of the training set below."""
    figure = Figure(figsize=(14, max(6.0, 0.44 * len(trials) + 1.0)), layout="constrained")
    grid = figure.subplots(2, 1 + len(TASKS))
    for above, below in grid[:, 1:].T:
        below.sharey(above)
    window = max(1, max(len(run.results["total_loss"]) for of in trials.values() for run in of) // 20)
    _lines(grid[0, 0], trials, lambda run: run.results["total_loss"], window)
    grid[0, 0].set_title(f"total loss of a batch, mean of {window}", fontsize="medium")
    count_along(grid[0, 0], "step")
    for panels, part, where in zip(grid[:, 1:], ("dev", "train"), ("dev", "part of the training set"), strict=True):
        for axes, task in zip(panels, TASKS, strict=True):
            _lines(axes, trials, lambda run, p=part, t=task: [e[p][t][MEASURES[t][0]] for e in run.trained(t)])
            axes.set_title(f"{task} {MEASURES[task][0]}, {where}", fontsize="medium")
            count_along(axes, "epoch that trains the task")
    grid[1, 0].set_axis_off()
    grid[1, 0].legend(*grid[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False, fontsize="small")
    figure.suptitle(title + _over_seeds(trials), fontsize="medium")
    return figure


def _cosines(title: str, trials: dict[str, list[Run]]) -> Figure:
    """Plot by epoch the mean cosine over all pairs, that of each pair, and the share of pairs in conflict."""
    panels: dict[str, Series] = {
        "mean cosine, all pairs": lambda run: [e["cosine"] for e in _with_cosines(run)],
        **{
            f"mean cosine, {a}-{b}": lambda run, pair=f"{a}-{b}": [e["cosines"].get(pair) for e in _with_cosines(run)]
            for a, b in PAIRS
        },
        "conflicting pairs": lambda run: [e["conflict"] for e in _with_cosines(run)],
    }
    figure = Figure(figsize=(16, max(3.4, 0.22 * len(trials) + 1)), layout="constrained")
    grid = figure.subplots(1, len(panels))
    for axes in grid[1:-1]:
        axes.sharey(grid[0])
    for axes, (name, series) in zip(grid, panels.items(), strict=True):
        _lines(axes, trials, series)
        axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
        axes.set_title(name, fontsize="medium")
        count_along(axes, "epoch with task gradients")
    grid[-1].set_ylim(-0.02, 1.02)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(f"{title}{_over_seeds(trials)}: cosines of the task gradients, below 0 conflict", fontsize="medium")
    return figure


def _times(rows: Sequence[Row]) -> Figure:
    """Plot each experiment's step parts and memory relative to unitary's, with the time that a report measured."""
    by_title = {title: labelled(members) for title, members in experiments(rows).items()}
    figure, grid = _panels([len(trials) for trials in by_title.values()], [3, 1], 5)
    for panels, (title, trials) in zip(grid, by_title.items(), strict=True):
        for place, trial in enumerate(trials.values()):
            left = 0.0
            for color, part in zip(COLORS, PARTS, strict=False):
                if part != "total":
                    width = float(np.mean([row[RELATIVE] * row[f"{part} ms"] / row["total ms"] for row in trial]))
                    label = part.replace("_", ", ") if place == 0 else None
                    panels[0].barh(place, width, left=left, color=color, label=label, height=0.7)
                    left += width
            panels[0].text(left, place, f" {mean(values(trial, RELATIVE)):.2f}", va="center", fontsize="small")
            if reported(trial[0]) is not None:
                panels[0].plot(reported(trial[0]), place, "kx", label="the report's")
            over = mean(values(trial, OVER))
            if over is not None:
                panels[1].barh(place, over, color="0.5", height=0.7)
                panels[1].text(over, place, f" {over:+.2f}", va="center", fontsize="small")
        panels[0].axvline(1, color="k", linewidth=0.8)
        panels[0].set_title("step time relative to unitary scalarization by AdamW", fontsize="small")
        panels[1].set_title("peak memory over unitary's, in gradients", fontsize="small")
        panels[1].margins(x=0.25)
        _name_lines(panels, list(trials), title)
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in pairs}
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=len(entries), frameon=False, fontsize="small"
    )
    return figure


def _panels(lines: Sequence[int], widths: Sequence[float], inches: float) -> tuple[Figure, NDArray[Any]]:
    """Make a row of panels for each experiment, with a height proportional to its number of lines."""
    heights = [1 + 0.28 * n for n in lines]
    figure = Figure(figsize=(2.5 + inches * len(widths), 0.6 + sum(heights)), layout="constrained")
    return figure, figure.subplots(len(lines), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)


def _name_lines(panels: Sequence[Axes], names: Sequence[str], title: str) -> None:
    """Write the names beside the first panel, from top to bottom, and the experiment's title beside them."""
    for axes in panels:
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [], fontsize="small")
    panels[0].set_ylabel(title)


def _lines(axes: Axes, trials: dict[str, list[Run]], series: Series, window: int = 1) -> None:
    """Plot a line for each trial: the mean over the seeds that got so far, smoothed over the last ``window`` times."""
    for k, (label, runs) in enumerate(trials.items()):
        times = zip_longest(*map(series, runs))
        each = np.array([mean([value for value in at if value is not None]) for at in times], float)
        if not len(each):
            continue
        smooth = np.convolve(each, np.full(window, 1 / window), "valid") if len(each) >= window else each[:0]
        axes.plot(
            np.arange(window, window + len(smooth)),
            smooth,
            STYLES[k // len(COLORS) % len(STYLES)],
            color=COLORS[k % len(COLORS)],
            linewidth=1.2,
            marker="o" if window == 1 else None,
            markersize=3,
            label=label,
        )
    axes.grid(alpha=0.3)


def _with_cosines(run: Run) -> list[dict[str, Any]]:
    return [entry for entry in run.results["epochs_log"] if entry["cosines"]]


def _over_seeds(trials: dict[str, list[Run]]) -> str:
    seeds = max(len(runs) for runs in trials.values())
    return f", means over up to {seeds} seeds" if seeds > 1 else ""
