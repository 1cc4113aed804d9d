"""The table printed in the terminal, with a line for each case."""

from typing import Any

from bench.cases import Case
from bench.contestants import FOREACH, MATMUL, NAIVE, ONE_LAUNCH, OURS, OUT
from bench.peers import COMPILE, PYTORCH_OPTIMIZER, TORCHJD

OTHERS = (OUT, ONE_LAUNCH, NAIVE, MATMUL, FOREACH, COMPILE, TORCHJD, PYTORCH_OPTIMIZER)
LABEL = 66
"""Width of a case's description in characters."""

LEGEND = """\
p20, p50, p80: time of one call of gradkern. bytes: the least it must move. % copy: those bytes by p50, in percent of
the bandwidth of a copy. peak: memory it takes while it runs. Columns with a name: time of that contestant divided by
gradkern's, the median over the rounds."""
COLUMNS = " ".join(
    [f"{'case':{LABEL}}", f"{'p20':>7} {'p50':>7} {'p80':>7} {'bytes':>7} {'% copy':>6} {'peak':>7}"]
    + [f"{name:>{max(7, len(name))}}" for name in OTHERS]
)


def line(row: dict[str, Any]) -> str:
    """Return the line of one case, to print under ``COLUMNS``."""
    case, ours = Case(**row["case"]), row["contestants"][OURS]
    cells = [f"{case!s:{LABEL}}", *(f"{seconds(ours[q]):>7}" for q in ("p20", "p50", "p80"))]
    cells += [f"{scaled(ours['bytes']):>7}", f"{digits(ours['percent of copy']):>6}", f"{scaled(ours['peak']):>7}"]
    for name in OTHERS:
        missing = "absent" if name in row["absent"] else ""
        cell = digits(row["ratios"][name]["p50"]) if name in row["ratios"] else missing
        cells.append(f"{cell:>{max(7, len(name))}}")
    return " ".join(cells).rstrip()


def table(results: dict[str, Any]) -> str:
    """Return the lines of all cases, the meaning of the columns, and the reasons for absences."""
    lines = [LEGEND, "", COLUMNS, *map(line, results["rows"])]
    for row in results["rows"]:
        lines += [f"{Case(**row['case'])}: {name} is absent: {why}" for name, why in row["absent"].items()]
    return "\n".join(lines)


def digits(value: float) -> str:
    """Format a number with three significant digits, and always with all digits before the point."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Format a time in a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value / 1e-6)} µs"


def scaled(value: float) -> str:
    """Format a number of bytes in a suitable unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{value:.0f} B"
