"""The text of advice: a table of 80 columns, its notes, and what to take."""

from collections.abc import Sequence
from textwrap import wrap

from gradkern.advice.cost import Cost

WIDTH = 80
HEADINGS = ("way", "memory", "in P", "trunk", "heads", "time", "")
UNITS = ("B", "kB", "MB", "GB", "TB")


def text(head: str, rows: Sequence[Cost], P: int, best: Cost | None, smallest: Cost | None) -> str:
    """Return the costs of all ways as text.

    Args:
        head: what has been measured.
        rows: the costs.
        P: the bytes of the parameters that train.
        best: the way to take; None for none.
        smallest: the way with the least memory, if that is to be told.
    """
    meanings = "Peak memory and time are over plain's; trunk and heads are numbers of backward passes."
    lines = [*wrap(f"{head} {meanings}", WIDTH), "", *_aligned([HEADINGS, *(_cells(cost, P) for cost in rows)]), ""]
    for note in dict.fromkeys(note for cost in rows for note in cost.notes):
        names = "; ".join(cost.name for cost in rows if note in cost.notes)
        lines += wrap(f"{names}: {note}.", WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", *_conclusion(P, best, smallest)])


def _conclusion(P: int, best: Cost | None, smallest: Cost | None) -> list[str]:
    if best is None:
        return ["No exact way fits into the memory of the device."]
    lines = wrap(f"Take {best.call}: {_told(best, P)}.", WIDTH)
    if smallest is not None:
        lines += wrap(f"Least memory with the exact update: {smallest.call}: {_told(smallest, P)}.", WIDTH)
    return lines


def _told(cost: Cost, P: int) -> str:
    assert cost.time is not None, "it can be taken"
    memory = "" if cost.memory is None else f", {size(cost.memory, sign=True)} ({_in_p(cost.memory, P)} P)"
    return f"{_number(cost.time)} times plain{memory}"


def _cells(cost: Cost, P: int) -> tuple[str, ...]:
    return (
        cost.name,
        "-" if cost.memory is None else size(cost.memory, sign=True),
        "-" if cost.memory is None else _in_p(cost.memory, P),
        *("-" if count is None else str(count) for count in (cost.trunk, cost.heads)),
        "-" if cost.time is None else _number(cost.time),
        cost.status,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first and the last column begin at the left, and numbers end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k in (0, len(row) - 1) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def counted(n: int, thing: str) -> str:
    """Return a number of things in words."""
    plural = "es" if thing.endswith("s") else "s"
    return f"{n} {thing}{plural if n > 1 else ''}"


def size(n: int, sign: bool = False) -> str:
    """Return a number of bytes with its unit."""
    value, unit = float(n), 0
    while abs(value) >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:{'+' if sign else ''}.{1 if unit else 0}f} {UNITS[unit]}"


def _in_p(memory: int, P: int) -> str:
    return _number(memory / P, sign=True)


def _number(x: float, sign: bool = False) -> str:
    digits = 2 if abs(x) < 100 else 1 if abs(x) < 1000 else 0
    return f"{x:{'+' if sign else ''}.{digits}f}"


def seconds(seconds: float) -> str:
    """Return seconds with their unit."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
