"""A short summary of raw results: the Markdown tables of the README."""

from collections.abc import Callable
from typing import Any

from bench.contestants import MATMUL, NAIVE, OURS
from bench.peers import PYTORCH_OPTIMIZER, TORCHJD

Row = dict[str, Any]


def summary(results: dict[str, Any]) -> str:
    """Return two tables of float32 matrices by T and P.

    The first compares PCGrad with others, the second compares the Gramian with the bandwidth of a copy.
    """
    found = results["peers"]
    others = {NAIVE: "the usual way"} | {n: f"{n} {found[n]}" for n in (TORCHJD, PYTORCH_OPTIMIZER) if n in found}
    lines = [f"PCGrad: how many times as long as gradkern takes {' / '.join(others.values())}", ""]
    lines += _grid(results, "pcgrad", lambda row: " / ".join(_ratio(row, name) for name in others))
    lines += ["", "Gramian: percent of the bandwidth of a copy / how many times as long `J @ J.T` takes", ""]
    lines += _grid(results, "gramian", lambda row: f"{_percent(row)} / {_ratio(row, MATMUL)}")
    return "\n".join(lines)


def _grid(results: dict[str, Any], operation: str, cell: Callable[[Row], str]) -> list[str]:
    """Return a table with a line for each T and a column for each P."""
    rows = {
        (row["case"]["T"], row["case"]["P"]): row
        for row in results["rows"]
        if row["case"]["operation"] == operation and row["case"]["dtype"] == "float32"
    }
    sizes = sorted({P for _, P in rows})
    lines = [f"| T | {' | '.join(f'P = {P:,}' for P in sizes)} |", "|" + "--:|" * (1 + len(sizes))]
    for T in sorted({T for T, _ in rows}):
        cells = [cell(rows[T, P]) if (T, P) in rows else "" for P in sizes]
        lines.append(f"| {T} | {' | '.join(cells)} |")
    return lines


def _ratio(row: Row, name: str) -> str:
    if name not in row["ratios"]:
        return "–"
    value = row["ratios"][name]["p50"]
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _percent(row: Row) -> str:
    return f"{row['contestants'][OURS]['percent of copy']:.0f} %"
