"""Raw results as a Markdown table."""

from typing import Any


def table(results: dict[str, Any]) -> str:
    """One line per shape: medians, our bandwidth, and the median of the ratios."""
    lines = ["| T | P | gradkern, µs | GB/s | `J @ J.T`, µs | copy, µs | times as fast |", "|" + "--:|" * 7]
    for row in results["rows"]:
        seconds = {name: q["p50"] for name, q in row["seconds"].items()}
        speed = row["times as fast as J @ J.T"]["p50"]
        cells = [
            str(row["T"]),
            f"{row['P']:,}",
            f"{1e6 * seconds['gradkern']:,.1f}",
            f"{row['bytes'] / seconds['gradkern'] / 1e9:.1f}",
            f"{1e6 * seconds['J @ J.T']:,.1f}",
            f"{1e6 * seconds['copy']:,.1f}",
            f"{speed:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
