"""Groups of comparable runs: experiments, trials, and grids of two settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any

from examples.minbert.outcomes import CHOICES, KINDS, Row, grouped, rank


def most_frequent(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the most frequent value of each choice but the method in an experiment. Labels leave these values out."""
    return {name: mode(row[name] for row in rows) for name in CHOICES[1:]}


def labelled(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows of an experiment by trial, under labels: the method, and values that are not the most frequent."""
    common = most_frequent(rows)
    labels: dict[str, list[Row]] = {}
    for trial in grouped(rows, CHOICES).values():
        first = trial[0]
        other = [setting_text(name, first[name]) for name in common if first[name] != common[name]]
        labels[", ".join([first["method"], *other])] = trial
    return labels


def experiments(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by experiment, under titles: the scheme, and settings that differ between its experiments."""
    made = {}
    for (scheme,), scheme_rows in grouped(rows, KINDS[:1]).items():
        differ = [name for name in KINDS[1:] if len({row[name] for row in scheme_rows}) > 1]
        for members in grouped(scheme_rows, KINDS).values():
            made[", ".join([scheme, *(setting_text(name, members[0][name]) for name in differ)])] = members
    return made


@dataclass(frozen=True)
class Grid:
    """Runs by the values of two settings, with equal other settings.

    Attributes:
        title: the other settings, as far as they differ between grids.
        down: one of ``CHOICES``, and its values.
        across: another one, and its values.
        cells: runs of each pair of values that has runs.
    """

    title: str
    down: tuple[str, list[Any]]
    across: tuple[str, list[Any]]
    cells: dict[tuple[Any, ...], list[Row]]


def grids(rows: Sequence[Row], down: str, across: str) -> list[Grid]:
    """Return a grid for each combination of other settings with several values of ``down``, of runs with scores."""
    made = []
    for experiment, members in experiments([row for row in rows if row["average"] is not None]).items():
        others = [name for name in CHOICES if name not in (down, across)]
        differ = [name for name in others if len({row[name] for row in members}) > 1]
        for alike in grouped(members, (*others, "phases")).values():
            lines, columns = (
                sorted({row[name] for row in alike}, key=lambda value, name=name: rank(name, value))
                for name in (down, across)
            )
            if len(lines) > 1:
                title = ", ".join([experiment, *(setting_text(name, alike[0][name]) for name in differ)])
                made.append(Grid(title, (down, lines), (across, columns), grouped(alike, (down, across))))
    return made


def value_text(value: Any) -> str:
    """Return the text of a setting's value."""
    return "none" if value is None else str(value)


def setting_text(name: str, value: Any) -> str:
    """Return the text of a setting: its name and its value."""
    return f"{name.replace('_', ' ')} {value_text(value)}"
