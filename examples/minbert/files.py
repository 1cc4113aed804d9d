"""The three tasks' sentences from the course project's files; rows that are malformed are told by file and line."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.minbert.examples import Example, Examples


@dataclass(frozen=True)
class Layout:
    """Of a task's files: how their names begin, the columns that are read, and what a label may be."""

    name: str
    sentences: tuple[str, ...]
    label: str
    most: int
    whole: bool

    def __str__(self) -> str:
        return f"{self.label} must be {'a whole number' if self.whole else 'a number'} from 0 to {self.most}"


LAYOUTS = {
    "sst": Layout("ids-sst", ("sentence",), "sentiment", 4, whole=True),
    "para": Layout("quora", ("sentence1", "sentence2"), "is_duplicate", 1, whole=True),
    "sts": Layout("sts", ("sentence1", "sentence2"), "similarity", 5, whole=False),
}
SHOWN = 20
"""Malformed rows that a message lists; the others it counts."""


def read(directory: Path, split: str, on_malformed: Callable[[str], object] | None = None) -> Examples:
    """The course project's files: tab-separated, quoted as CSV, in UTF-8, with a header that names the columns.

    A row is malformed if its quotes do not close, it has more or fewer fields than the header, a sentence is empty, or
    the label is none: 0 … 4 (sst), 0 or 1 (para), 0 to 5 (sts).

    Args:
        directory: with ``ids-sst-{split}.csv``, ``quora-{split}.csv`` and ``sts-{split}.csv``.
        split: "train" or "dev".
        on_malformed: is told of malformed rows, by file and line, which are then left out; None to raise instead.

    Raises:
        FileNotFoundError: of all files that are not there.
        ValueError: a file lacks a column or has no example, or rows are malformed: of all files in one message.
    """
    paths = {task: Path(directory) / f"{layout.name}-{split}.csv" for task, layout in LAYOUTS.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"directory={str(directory)!r} has no {', '.join(missing)}")
    found: Examples = {}
    malformed: list[str] = []
    for task, path in paths.items():
        found[task], wrong = _read(path, LAYOUTS[task])
        malformed += wrong
    if malformed:
        told = f"{len(malformed)} malformed row{'s' * (len(malformed) > 1)}:"
        told = "\n  ".join([told, *malformed[:SHOWN]])
        told += f"\n  and {len(malformed) - SHOWN} more" if len(malformed) > SHOWN else ""
        if on_malformed is None:
            raise ValueError(told)
        on_malformed(f"left out {told}")
    for task, path in paths.items():
        if not found[task]:
            raise ValueError(f"{path} has no example")
    return found


def _read(path: Path, layout: Layout) -> tuple[list[Example], list[str]]:
    """The examples of a file, and what is wrong with its other rows."""
    examples: list[Example] = []
    malformed: list[str] = []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # so that a bad byte has its line
        rows = csv.reader(file, delimiter="\t", strict=True)
        header = next(rows, [])
        absent = [name for name in ("id", *layout.sentences, layout.label) if name not in header]
        if absent:
            raise ValueError(f"{path}:1: no column {', '.join(map(repr, absent))}; the columns are {header}")
        while True:
            line = rows.line_num + 1
            try:
                examples.append(_example(header, next(rows), layout))
            except StopIteration:
                return examples, malformed
            except (csv.Error, ValueError) as error:
                to = f" to {rows.line_num}" if rows.line_num > line else ""  # an open quote swallows lines
                malformed.append(f"{path}:{line}{to}: {error}")


def _example(header: list[str], fields: list[str], layout: Layout) -> Example:
    if len(fields) != len(header):
        raise ValueError(f"{len(header)} fields expected, got {len(fields)}")
    row = {name: field.strip() for name, field in zip(header, fields, strict=True)}
    for name in layout.sentences:
        if not row[name]:
            raise ValueError(f"{name} is empty")
        if any("\udc80" <= c <= "\udcff" for c in row[name]):
            raise ValueError(f"{name} is not UTF-8: {row[name]!r:.200}")
    try:
        label = float(row[layout.label])
    except ValueError:
        label = math.nan
    if not 0 <= label <= layout.most or (layout.whole and label != int(label)):
        raise ValueError(f"{layout}, got {row[layout.label]!r:.200}")
    return Example(row["id"], tuple(row[name] for name in layout.sentences), label)
