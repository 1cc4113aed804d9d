"""Checks of a sampler's arguments. An error names the argument and its value."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gradkern.arguments import integer, sequence


def checked_lengths(loaders: object) -> list[int]:
    """Check ``loaders`` and return the number of batches of each."""
    loaders = sequence("loaders", loaders, "a sequence of data loaders, one per task")
    if not loaders:
        raise ValueError(f"loaders is empty: {loaders!r}")
    first: dict[int, int] = {}
    lengths = []
    for i, loader in enumerate(loaders):
        kind = type(loader).__name__
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise TypeError(f"loaders[{i}] must be a data loader that can be iterated again and again, got {kind}")
        length = _length(loader)
        if length is None:
            raise TypeError(f"loaders[{i}] must have a length, got {kind} without one")
        if length == 0:
            raise ValueError(f"loaders[{i}] has no batches: its length is 0")
        j = first.setdefault(id(loader), i)
        if j != i:
            raise ValueError(f"loaders[{j}] and loaders[{i}] are one object; each task needs a loader of its own")
        lengths.append(length)
    return lengths


def dataset_sizes(loaders: Sequence[Iterable[Any]]) -> list[int]:
    """Return the number of examples of each loader's dataset."""
    sizes = []
    for i, loader in enumerate(loaders):
        size = _length(getattr(loader, "dataset", None))
        if not size:
            raise ValueError(f"sizes is None, and loaders[{i}] has no dataset with a length: give sizes")
        sizes.append(size)
    return sizes


def checked_sizes(sizes: object, n_tasks: int) -> list[int]:
    """Check ``sizes`` and return them as a list of integers, one per task, each at least 1."""
    sizes = sequence("sizes", sizes, "a sequence of integers, one per task")
    if len(sizes) != n_tasks:
        raise ValueError(f"sizes has {len(sizes)} entries for {n_tasks} loaders: {sizes!r}")
    return [integer(f"sizes[{i}]", size, 1) for i, size in enumerate(sizes)]


def _length(thing: object) -> int | None:
    try:
        return len(thing)  # type: ignore[arg-type]  # a DataLoader has __len__ even where its dataset has none
    except TypeError:
        return None
