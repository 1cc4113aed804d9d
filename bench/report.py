"""Raw results as Markdown tables."""

from typing import Any

COLUMNS = "| T | P | gradkern, µs | GB/s | `J @ J.T`, µs | copy, µs | times as fast |\n" + "|" + "--:|" * 7


def line(row: dict[str, Any]) -> str:
    """One shape: medians, our bandwidth, and the median of the ratios. Goes under ``COLUMNS``."""
    seconds = {name: q["p50"] for name, q in row["seconds"].items()}
    cells = [
        str(row["T"]),
        f"{row['P']:,}",
        f"{1e6 * seconds['gradkern']:,.1f}",
        f"{row['bytes'] / seconds['gradkern'] / 1e9:.1f}",
        f"{1e6 * seconds['J @ J.T']:,.1f}",
        f"{1e6 * seconds['copy']:,.1f}",
        f"{row['times as fast as J @ J.T']['p50']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def summary(results: dict[str, Any]) -> str:
    """How many times as fast as ``J @ J.T``: one line per T, one column per P."""
    sizes = sorted({row["P"] for row in results["rows"]})
    lines = [f"| T | {' | '.join(f'P = {P:,}' for P in sizes)} |", "|" + "--:|" * (1 + len(sizes))]
    for T in sorted({row["T"] for row in results["rows"]}):
        speed = {row["P"]: row["times as fast as J @ J.T"]["p50"] for row in results["rows"] if row["T"] == T}
        lines.append(f"| {T} | {' | '.join(f'{speed[P]:.2f}' for P in sizes)} |")
    return "\n".join(lines)
