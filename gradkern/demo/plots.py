"""PNG plots of the comparison: the accuracies of each method, and the losses and cosines during training."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gradkern.demo.methods import BASELINE, family
from gradkern.demo.results import PAIR_NAMES, TASK_NAMES, Result, by_method, ranked, rows
from gradkern.plots import count_along, legend_beside

REFERENCES = {BASELINE: "--", "pcgrad": ":"}
"""The methods that the others are compared with: black in every row of panels, each in its line style."""
TOGETHER = 4
"""The number of methods without a family that share a row of panels."""


def plot_outcome(results: Sequence[Result], path: Path) -> None:
    """Plot accuracies and the time of a step: a row for each method, the best first, and a colour for each family."""
    methods = ranked(results)
    families = list(dict.fromkeys(family(method) for method in by_method(results)))
    time, unit = (f"step relative to {BASELINE}", "") if BASELINE in methods else ("step ms", " (ms)")
    panels = [(f"accuracy {name}", f"{name} (%)", 100) for name in TASK_NAMES]
    panels += [("mean accuracy", "mean accuracy (%)", 100), (time, time.removesuffix(" ms") + unit, 1)]
    figure = Figure(figsize=(13, 1.6 + 0.32 * len(methods)), layout="constrained")
    for axes, (column, title, scale) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for place, (method, runs) in enumerate(methods.items()):
            values = np.array([row[column] for row in rows(results) if row["method"] == method], float) * scale
            color = f"C{families.index(family(method))}"
            axes.plot(values, np.full(len(runs), place), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
            spread = values.std(ddof=1) if len(runs) > 1 else None
            axes.errorbar(values.mean(), place, xerr=spread, fmt="D", color=color, markersize=4, capsize=3)
            if method == BASELINE:
                axes.axvline(values.mean(), color="0.5", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    spread_of = " ± standard deviation, and each seed" if len(results) > len(methods) else ""
    figure.suptitle(f"After the last epoch: {_over_seeds(results)}{spread_of}", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_losses(results: Sequence[Result], path: Path) -> None:
    """Plot the training loss of each task by epoch."""
    figure = _by_epoch(results, TASK_NAMES, lambda r: r.losses, "loss (nats)")
    figure.suptitle(f"Training loss of each task by epoch: {_over_seeds(results)}", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_cosines(results: Sequence[Result], path: Path) -> None:
    """Plot the cosine of each pair of tasks by epoch."""
    figure = _by_epoch(results, PAIR_NAMES, lambda r: r.cosines, "cosine")
    for axes in figure.axes:
        axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    title = "Cosine of two tasks' gradients by epoch (below 0: conflict)"
    figure.suptitle(f"{title}: {_over_seeds(results)}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _by_epoch(
    results: Sequence[Result], names: Sequence[str], series: Callable[[Result], list[list[float]]], unit: str
) -> Figure:
    """Plot series by epoch: a row of panels for a few methods, to tell lines apart, and a column for each name."""
    families = _families(results)
    figure = Figure(figsize=(11, 0.8 + 2 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), len(names), sharex=True, sharey="col", squeeze=False)
    for panels, members in zip(grid, families.values(), strict=True):
        for column, axes in enumerate(panels):
            colors = iter(f"C{k}" for k in range(len(members)))
            for method, runs in by_method(members).items():
                values = np.mean([series(r) for r in runs], axis=0)[:, column]
                style = REFERENCES.get(method, "-")
                color = "black" if method in REFERENCES else next(colors)
                epochs = np.arange(1, len(values) + 1)
                axes.plot(epochs, values, style, color=color, marker="o", markersize=3, linewidth=1.2, label=method)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(unit)
        legend_beside(panels[-1])
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize="medium")
    for axes in grid[-1]:
        count_along(axes, "epoch")
    return figure


def _families(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results for each row of panels, with the references' results first.

    A family of several methods has a row of its own. The other methods share rows, ``TOGETHER`` in each.
    """
    references = [r for r in results if r.method in REFERENCES]
    others = list(dict.fromkeys(r.method for r in results if r.method not in REFERENCES))
    size = Counter(map(family, others))
    alone = [method for method in others if size[family(method)] == 1]
    row_of = {method: family(method) for method in others} | {m: str(k // TOGETHER) for k, m in enumerate(alone)}
    families: dict[str, list[Result]] = {}
    for r in results:
        if r.method not in REFERENCES:
            families.setdefault(row_of[r.method], list(references)).append(r)
    return families or {"": references}


def _over_seeds(results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean over {len(seeds)} seeds"
