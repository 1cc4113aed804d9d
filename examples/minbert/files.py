"""Reader of the course project's files. Malformed rows are reported by file and line."""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.minbert.examples import Example, Examples


@dataclass(frozen=True)
class Layout:
    """Layout of a task's files: start of the file name, columns to read, and range of the label."""

    name: str
    sentences: tuple[str, ...]
    label: str
    maximum: int
    integer: bool

    def __str__(self) -> str:
        return f"{self.label} must be {'a whole number' if self.integer else 'a number'} from 0 to {self.maximum}"


LAYOUTS = {
    "sst": Layout("ids-sst", ("sentence",), "sentiment", 4, integer=True),
    "para": Layout("quora", ("sentence1", "sentence2"), "is_duplicate", 1, integer=True),
    "sts": Layout("sts", ("sentence1", "sentence2"), "similarity", 5, integer=False),
}
MAX_LISTED = 20
"""Most malformed rows that a message lists; it counts the others."""


def read(directory: Path, split: str, on_malformed: Callable[[str], object] | None = None) -> Examples:
    """Read the course project's files: tab-separated, quoted as CSV, in UTF-8, with a header that names the columns.

    A row is malformed if its quotes do not close, it has more or fewer fields than the header, a sentence is empty, or
    the label is not valid: 0 … 4 (sst), 0 or 1 (para), 0 to 5 (sts).

    Args:
        directory: folder with ``ids-sst-{split}.csv``, ``quora-{split}.csv`` and ``sts-{split}.csv``.
        split: "train" or "dev".
        on_malformed: called with a message that lists the malformed rows, which are then left out; None to raise.

    Raises:
        FileNotFoundError: files are missing; the message names all of them.
        ValueError: a file lacks a column or has no example, or rows are malformed; one message lists those of all
            files.
    """
    paths = {task: Path(directory) / f"{layout.name}-{split}.csv" for task, layout in LAYOUTS.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"directory={str(directory)!r} has no {', '.join(missing)}")
    examples: Examples = {}
    malformed: list[str] = []
    for task, path in paths.items():
        examples[task], errors = _read(path, LAYOUTS[task])
        malformed += errors
    if malformed:
        message = f"{len(malformed)} malformed row{'s' * (len(malformed) > 1)}:"
        message = "\n  ".join([message, *malformed[:MAX_LISTED]])
        message += f"\n  and {len(malformed) - MAX_LISTED} more" if len(malformed) > MAX_LISTED else ""
        if on_malformed is None:
            raise ValueError(message)
        on_malformed(f"left out {message}")
    for task, path in paths.items():
        if not examples[task]:
            raise ValueError(f"{path} has no example")
    return examples


def _read(path: Path, layout: Layout) -> tuple[list[Example], list[str]]:
    """Return the examples of a file, and a message for each malformed row."""
    examples: list[Example] = []
    malformed: list[str] = []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:  # to find a bad byte's line
        rows = csv.reader(file, delimiter="\t", strict=True)
        header = next(rows, [])
        missing = [name for name in ("id", *layout.sentences, layout.label) if name not in header]
        if missing:
            raise ValueError(f"{path}:1: no column {', '.join(map(repr, missing))}; the columns are {header}")
        while True:
            line = rows.line_num + 1
            try:
                examples.append(_example(header, next(rows), layout))
            except StopIteration:
                return examples, malformed
            except (csv.Error, ValueError) as error:
                to = f" to {rows.line_num}" if rows.line_num > line else ""  # an open quote spans several lines
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
    if not 0 <= label <= layout.maximum or (layout.integer and label != int(label)):
        raise ValueError(f"{layout}, got {row[layout.label]!r:.200}")
    return Example(row["id"], tuple(row[name] for name in layout.sentences), label)
