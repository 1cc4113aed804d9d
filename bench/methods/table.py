"""Markdown tables of raw results, for the terminal and the notes."""

from typing import Any

from bench.methods.contestants import COPY, OURS, THEIRS
from bench.table import digits

WHAT = {"rows": "weights", "whole": "aggregation"}
WEIGHTS_LEGEND = f"""\
The weights alone, from a float64 Gramian of T rows: microseconds of gradkern's (median), and in brackets how many times
as long TorchJD's weighting takes, the median of ratios of one round. Where {THEIRS} finds no weights by themselves, its
whole aggregation of T rows of T numbers counts. words: what a step moves for each parameter beyond its backward passes,
as `gradkern methods` tells. "-": not measured; see below. {THEIRS} has no method where there is no bracket. Arguments
that are made for a number of tasks are made to fit: T itself, and fixed weights over and over."""
WHOLE_LEGEND = """\
A whole aggregation of float32 rows: Gramian, weights, combination. The ratios say how many times as long as gradkern's
a copy of the rows takes, and TorchJD's aggregator. With two batches it is J₁J₂ᵀ, the weights, the product with J₁."""


def table(results: dict[str, Any]) -> str:
    """Return both tables, with the meaning of their columns, and what was left out."""
    machine, versions = results["machine"], results["versions"]
    torchjd = results["peers"].get(THEIRS)
    software = f"Python {versions['python']}, torch {versions['torch']}" + (f", TorchJD {torchjd}" if torchjd else "")
    blocks = [
        f"{machine['model']}, threads: {machine['threads']}, {software}",
        _weights(results["rows"], results["tasks"]),
        WEIGHTS_LEGEND,
        _whole(results["whole"], results["shape"]),
        WHOLE_LEGEND,
    ]
    left_out = _left_out(results)
    return "\n\n".join([*blocks, *(["\n".join(left_out)] if left_out else [])])


def _left_out(results: dict[str, Any]) -> list[str]:
    """Return a line for each reason, with the numbers of tasks that it holds for."""
    reasons: dict[tuple[str, str, str], list[int]] = {}
    for s in results["skipped"]:
        reasons.setdefault((OURS, s["method"], f"{WHAT[s['what']]}: {s['why']}"), []).append(s["T"])
    for key, what in WHAT.items():
        for row in results[key]:
            for name, why in row["absent"].items():
                reasons.setdefault((name, row["method"], f"{what}: {why}"), []).append(row["T"])
    return [
        f"- Left out: {name}'s {method}, T = {', '.join(map(str, tasks))}, {reason}"
        for (name, method, reason), tasks in reasons.items()
    ]


def _weights(rows: list[dict[str, Any]], tasks: list[int]) -> str:
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["T"]] = row
    columns = [f"T = {T}" for T in tasks]
    lines = [f"| weights, µs | words | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]
    for name, of_T in by_method.items():
        words = next(iter(of_T.values()))["words"]
        lines.append(f"| {name} | {words} | {' | '.join(_cell(of_T.get(T)) for T in tasks)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    theirs = f" ({digits(row['ratios'][THEIRS]['p50'])} ×)" if THEIRS in row["ratios"] else ""
    return f"{digits(1e6 * row['seconds'][OURS]['p50'])}{theirs}"


def _whole(rows: list[dict[str, Any]], shape: list[int]) -> str:
    T, P = shape
    lines = [f"| {T} × {P:,} | words | ms | copy | {THEIRS} |", "|---|---|--:|--:|--:|"]
    for row in rows:
        ratios = [digits(row["ratios"][name]["p50"]) if name in row["ratios"] else "-" for name in (COPY, THEIRS)]
        lines.append(
            f"| {row['method']} | {row['words']} | {digits(1e3 * row['seconds'][OURS]['p50'])} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)
