"""Plots of raw results: time against size with the bandwidth limit, and time against the suppressed share."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.contestants import NAMES, OURS
from bench.floors import COPY

Row = dict[str, Any]
COLORS = {name: f"C{k}" for k, name in enumerate(NAMES)}


def write_plots(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Write the PNG figures into ``folder``; return their paths.

    There is one for each operation and dtype measured at several P, and one for each surgery under suppression.
    """
    of_machine = f"{results['machine']['model']}, {results['date'][:10]}"
    written = []
    for (operation, dtype), rows in _by(results["rows"], "operation", "dtype").items():
        rows = [row for row in rows if row["case"]["shapes"] == "matrix"]
        if len({row["case"]["P"] for row in rows}) > 1:
            written.append(folder / f"{operation}-{dtype}.png")
            _roofline(rows, f"{operation} of T x P {dtype}: {of_machine}").savefig(written[-1], dpi=150)
    for (shapes, T, dtype), rows in _by(results["rows"], "shapes", "T", "dtype").items():
        rows = [row for row in rows if row["case"]["operation"] == "surgery" and row["case"]["groups"] == "model"]
        for (P,), of_size in _by(rows, "P").items():
            if any(row["case"]["p"] for row in of_size):
                written.append(folder / f"suppression-{shapes}-{T}x{P}-{dtype}.png")
                title = f"Surgery of {T} x {P:,} {dtype}, {shapes}, under suppression: {of_machine}"
                _suppression(of_size, title).savefig(written[-1], dpi=150)
    return written


def _roofline(rows: list[Row], title: str) -> Figure:
    """Plot a panel for each T: seconds against P, and the floor, which is least bytes by the bandwidth of a copy."""
    panels = _by(rows, "T")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2 + 4 * columns, 1.2 + 3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((T,), of_T) in zip(grid.flat, sorted(panels.items()), strict=False):
        _lines(axes, of_T, "P")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"T = {T}", fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("P, numbers of a task gradient")
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds (median)")
    _legend(figure)
    figure.suptitle(title, fontsize="medium")
    return figure


def _suppression(rows: list[Row], title: str) -> Figure:
    """Plot a panel for each form of suppression: seconds against the probability, starting at 0."""
    dense = [row for row in rows if not row["case"]["p"]]
    panels = _by([row for row in rows if row["case"]["p"]], "block", "scope")
    figure = Figure(figsize=(2 + 4 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, ((block, scope), suppressed) in zip(grid, panels.items(), strict=True):
        _lines(axes, dense + suppressed, "p")
        axes.set_title(f"block = {block}, scope = {scope!r}", fontsize="medium")
        axes.set_yscale("log")
        axes.set_xticks(sorted({row["case"]["p"] for row in rows}))
        axes.set_xlabel("p, probability to be dropped (0: no suppression)")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("seconds (median)")
    _legend(figure)
    figure.suptitle(title, fontsize="medium")
    return figure


def _lines(axes: Axes, rows: list[Row], x: str) -> None:
    rows = sorted(rows, key=lambda row: row["case"][x])
    for name in NAMES:
        points = [(row["case"][x], row["contestants"][name]) for row in rows if name in row["contestants"]]
        if points and name != COPY:
            xs, medians = zip(*((at, q["p50"]) for at, q in points), strict=True)
            (curve,) = axes.plot(xs, medians, "o-", markersize=3, linewidth=0.9, color=COLORS[name], label=name)
            if name == OURS:
                curve.set(linewidth=2.5, zorder=3, label=f"{name} (band: p20 to p80)")
                p20, p80 = ([q[end] for _, q in points] for end in ("p20", "p80"))
                axes.fill_between(xs, p20, p80, color=COLORS[name], alpha=0.25, linewidth=0)
    floor = [row["contestants"][OURS]["bytes"] * _copy_seconds_per_byte(row) for row in rows]
    axes.plot([row["case"][x] for row in rows], floor, "k--", linewidth=1.2, label="floor: bytes / copy's bandwidth")


def _copy_seconds_per_byte(row: Row) -> float:
    copy = row["contestants"][COPY]
    return copy["p50"] / copy["bytes"]


def _legend(figure: Figure) -> None:
    pairs = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
    entries = {label: line for of_axes in pairs for line, label in of_axes}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(4, len(entries)), frameon=False)


def _by(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row["case"][key] for key in keys)].append(row)
    return groups
