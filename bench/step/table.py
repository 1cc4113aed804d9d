"""A Markdown table of raw results, for the terminal and the README."""

from typing import Any

from bench.step.contestants import BASELINE
from bench.step.model import BATCH, LENGTH
from bench.step.parts import PARTS
from bench.table import digits, scaled

LEGEND = f"""\
Medians. "× baseline": how many times as long as {BASELINE} with torch's fused AdamW, round by
round, with the 20th and 80th percentile. A fused step is one pass of gradkern's AdamW along the combined gradient; all
others end with torch's. The parts were timed in rounds of their own; a fused step combines in its update. Memory: the
peak above the baseline's, in bytes and in rows of P float32 numbers."""


def table(results: dict[str, Any]) -> str:
    """Return a table with a line for each contestant, the meaning of the columns, and the contestants left out."""
    machine, rows = results["machine"], results["rows"]
    threads = f", threads: {machine['threads']}" if machine["device"] == "cpu" else ""
    software = {"torch": results["versions"]["torch"]} | results["peers"]
    graphs = any("captured" in row for row in rows)
    columns = ["ms", "× baseline", *(f"{part}, ms" for part in PARTS), "memory", "rows"]
    columns += ["as a CUDA graph, ms", "× baseline's graph"] if graphs else []
    lines = [
        f"{results['size']}, P = {results['P']:,}, three tasks of {BATCH} × {LENGTH} tokens, float32: "
        f"{machine['model']}{threads}, {', '.join(f'{name} {version}' for name, version in software.items())}",
        "",
        f"| one step | {' | '.join(columns)} |",
        "|---|" + "--:|" * len(columns),
    ]
    for row in rows:
        cells = [_ms(row["seconds"]), _ratio(row["ratio"]), *(_ms(row["parts"][part]) for part in PARTS)]
        cells += [_signed(row["over"]), f"{row['over in rows']:+.2f}"]
        if graphs:
            graph = row.get("captured")
            cells += [_ms(graph["seconds"]), _ratio(graph["ratio"])] if graph else ["–", "–"]
        lines.append(f"| {row['contestant']} | {' | '.join(cells)} |")
    lines += ["", LEGEND]
    lines += [""] if results["skipped"] else []
    lines += [f"- Left out, {s['what']}: {s['contestant']} ({s['why']})" for s in results["skipped"]]
    return "\n".join(lines)


def _ms(seconds: dict[str, float]) -> str:
    return digits(1e3 * seconds["p50"])


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['p50']:.2f} ({ratio['p20']:.2f}–{ratio['p80']:.2f})"


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'}{scaled(abs(value))}"
