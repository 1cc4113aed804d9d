"""The comparison as PNG plots: the loss of each task, and the cosine of each pair of tasks, by epoch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradkern.demo.results import PAIR_NAMES, TASK_NAMES, Result, by_method

STYLES = ["-", "--", ":", "-."]


def plot_losses(results: Sequence[Result], path: Path) -> None:
    """A panel for each task with a line for each method, the mean over seeds, in a band from the least to the most."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(TASK_NAMES))
    for task, (axes, name) in enumerate(zip(panels, TASK_NAMES, strict=True)):
        for m, (method, runs) in enumerate(by_method(results).items()):
            losses = np.array([r.losses for r in runs])[:, :, task]  # (seeds, epochs)
            epochs = np.arange(1, losses.shape[1] + 1)
            color, style = f"C{m}", STYLES[m % len(STYLES)]
            axes.plot(epochs, losses.mean(0), style, color=color, marker="o", markersize=3, label=method)
            axes.fill_between(epochs, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)
        axes.set_title(f"task: {name}")
        axes.set_ylim(bottom=0)
        _by_epoch(axes)
    panels[0].set_ylabel("training loss (cross-entropy, nats)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    band = ", band from least to most" if len({r.seed for r in results}) > 1 else ""
    figure.suptitle(f"Loss by epoch: {_over_seeds(results)}{band}", fontsize="medium")
    figure.savefig(path, dpi=150)


def plot_cosines(results: Sequence[Result], path: Path) -> None:
    """A line for each pair of tasks, in its colour, and method, in its line style; the mean over seeds."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for m, (method, runs) in enumerate(by_method(results).items()):
        cosines = np.mean([r.cosines for r in runs], axis=0)  # (epochs, pairs)
        epochs = np.arange(1, len(cosines) + 1)
        for pair, name in enumerate(PAIR_NAMES):
            style = STYLES[m % len(STYLES)]
            label = f"{name}, {method}"
            axes.plot(epochs, cosines[:, pair], style, color=f"C{pair}", marker="o", markersize=3, label=label)
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    axes.set_ylabel("cosine of two task gradients\n(below 0: conflict)")
    _by_epoch(axes)
    figure.legend(loc="outside right center", frameon=False, title="pair of tasks, method")
    figure.suptitle(f"Cosine by epoch: {_over_seeds(results)}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _by_epoch(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _over_seeds(results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean over {len(seeds)} seeds"
