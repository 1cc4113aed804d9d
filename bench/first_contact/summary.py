"""The readable summary: one table of steps, what failed, and the few figures that decide."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.first_contact.child import PASSED, SKIPPED

Json = dict[str, Any]
LAUNCHES = "one launch against three"
"""The key of rows of raw results, beside "rows", which the sweep has."""


def markdown(summary: Json, out: Path) -> str:
    """Return the summary of the steps so far, with figures from the files in ``out``."""
    machine = summary["machine"]
    lines = ["# First contact" + (", a dry run without a GPU" if summary["dry"] else ""), ""]
    lines += [f"{machine.get('model', machine)}; {_versions(machine)}", ""]
    if summary["dry"]:
        lines += ["The inputs are tiny, and the CPU computes: no figure here is a measurement of a GPU.", ""]
    lines += ["| step | decides | | seconds | limit | result |", "|---|---|---|--:|--:|---|"]
    for step in summary["steps"]:
        took, message = f"{step['seconds']:.0f} | {step['limit']:.0f}", step["message"].replace("|", "\\|")
        lines.append(f"| {step['name']} | {step['decides']} | {step['status']} | {took} | {message} |")
    for step in summary["steps"]:
        if step["status"] not in (PASSED, SKIPPED) and step["tail"]:
            lines += ["", f"## {step['name']}: {step['status']}", "", "```", *step["tail"], "```"]
    lines += _tests(_read(out / "tests.json"))
    measured = _read(out / "sweep.json")
    lines += _passes(measured.get("rows", [])) + _launches(measured.get(LAUNCHES, []))
    return "\n".join(lines) + "\n"


def _versions(machine: Json) -> str:
    found = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    smi = machine.get("card", {}).get("nvidia-smi", "")
    return f"{found}; driver {smi['driver_version']}" if isinstance(smi, dict) else f"{found}; {smi}"


def _read(path: Path) -> Json:
    """Return what a file holds; nothing if it is missing, or damaged, as one of another program's may be."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tests(tests: Json) -> list[str]:
    """Return the names of failed tests."""
    if not tests.get("failures"):
        return []
    return ["", "## Failed tests", "", *(f"- {failure['test']}" for failure in tests["failures"])]


def _passes(rows: list[Json]) -> list[str]:
    """Return a table of milliseconds, and percents of a copy's bandwidth, by the rows and the pass."""

    def cell(row: Json) -> str:
        ours = row["contestants"]["gradkern"]
        return f"{1e3 * ours['p50']:.3g} ({ours['percent of copy']:.0f})"

    head = "Kernels: milliseconds (percent of the bandwidth of a copy)"
    return _grid(head, rows, lambda case: f"T = {case['T']}, {case['dtype']}", lambda case: case["operation"], cell)


def _launches(rows: list[Json]) -> list[str]:
    """Return a table of one launch's time, divided by that of three, by the rows and their length."""

    def by(case: Json) -> str:
        return f"T = {case['T']}, {case['dtype']}, by {case['groups']}"

    def cell(row: Json) -> str:
        return f"{row['ratios']['one launch']['p50']:.2f}"

    both = [row for row in rows if "one launch" in row["ratios"]]
    return _grid("One launch: its time divided by that of three", both, by, lambda case: f"{case['P']:,}", cell)


def _grid(
    title: str,
    rows: list[Json],
    line: Callable[[Json], str],
    column: Callable[[Json], str],
    cell: Callable[[Json], str],
) -> list[str]:
    """Return a titled table with a line and a column for each name; nothing if there are no rows."""
    if not rows:
        return []
    cells = {(line(row["case"]), column(row["case"])): cell(row) for row in rows}
    columns = list(dict.fromkeys(name for _, name in cells))
    lines = ["", f"## {title}", "", f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name in dict.fromkeys(name for name, _ in cells):
        lines.append(f"| {name} | {' | '.join(cells.get((name, other), '') for other in columns)} |")
    return lines
