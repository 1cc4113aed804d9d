"""The plan of a step: what follows from its parameters' layouts, and from which of them each task reaches.

A plan is remembered. Its key is all that it depends on: the parameters' shapes, strides, dtypes and devices, which of
them require grad, their groups, and which task reaches which of them. A change in any of these makes another key, so a
remembered plan is never out of date. It keeps no tensor alive.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from gradkern.gradients.layouts import PLANS, Layouts, Reach, make_room


class Column(NamedTuple):
    """A parameter that at least one task reaches.

    Attributes:
        place: its number among the n parameters.
        numel: its number of elements.
        dtype: the dtype of the real numbers in its gradients, and so in ``.grad``.
        tasks: the tasks that reach it.
        segment: its group, or None for an unshared parameter, which gets the sum of its gradients.
        unit: the number of its first unit of gradient suppression; -1 if it is never masked.
        sparse: whether all its gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
        complex: whether it is complex; its gradients are pairs of real numbers.
    """

    place: int
    numel: int
    dtype: torch.dtype
    tasks: tuple[int, ...]
    segment: int | None
    unit: int
    sparse: bool
    complex: bool = False

    @property
    def own(self) -> int | None:
        """The only task that reaches an unshared parameter; None for any other parameter."""
        return self.tasks[0] if self.segment is None and len(self.tasks) == 1 else None


class Batch:
    """Columns of one dtype that one call of an operator takes.

    Attributes:
        columns: the columns.
        segments: their groups; an unshared one's is ``unshared``.
        units: their first units of suppression.
    """

    def __init__(self, columns: Sequence[Column], unshared: int, n: int) -> None:
        self.columns = columns
        self.dtype = columns[0].dtype
        self.segments = [unshared if c.segment is None else c.segment for c in columns]
        self.units = [c.unit for c in columns]
        places = [c.place for c in columns]
        self._pick = None if places == list(range(n)) else _picker(places)

    def of(self, rows: Iterable[Sequence[Any]]) -> list[Any]:
        """Return the columns' entries of rows of n entries, row by row."""
        if self._pick is None:
            return [entry for row in rows for entry in row]
        return [entry for row in rows for entry in self._pick(row)]


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) == 1:
        return lambda row: (row[places[0]],)
    return itemgetter(*places)


class Arrangement:
    """The columns of T rows of n gradients, and the batches in which they are multiplied and combined.

    Attributes:
        columns: the parameters that any task reaches.
        n: the number of all parameters.
        n_segments: S, the number of groups.
        steppable: whether AdamW has checked that it can step along these columns.
        mixed: the places of parameters with some sparse and some dense gradients, which are all read as dense.
    """

    def __init__(self, columns: Sequence[Column], n: int, n_segments: int, mixed: Sequence[int] = ()) -> None:
        self.columns = columns
        self.n = n
        self.n_segments = n_segments
        self.mixed = mixed
        self.steppable = False
        self._chosen: dict[tuple[int, ...], Batch] = {}

    @cached_property
    def shared(self) -> list[Column]:
        """The columns under surgery."""
        return [c for c in self.columns if c.segment is not None]

    @cached_property
    def products(self) -> list[Batch]:
        """The dense columns of the dot products."""
        return self._batches(c for c in self.shared if not c.sparse)

    @cached_property
    def products_of_all(self) -> list[Batch]:
        """The dense columns of the dot products, if unshared parameters are one more group."""
        return self._batches(c for c in self.columns if not c.sparse)

    @cached_property
    def sums(self) -> list[Batch]:
        """The dense columns that are combined if unshared parameters get the sum of their gradients.

        They are the same object as :attr:`products` if they can be: all other columns are one task's own.
        """
        if not self.adds_up:
            return self.products
        return self._batches(c for c in self.columns if not c.sparse and c.own is None)

    @cached_property
    def sparse(self) -> list[Column]:
        """The columns of sparse gradients."""
        return [c for c in self.columns if c.sparse]

    @cached_property
    def complex(self) -> list[Column]:
        """The columns of complex parameters."""
        return [c for c in self.columns if c.complex]

    @cached_property
    def own(self) -> list[Column]:
        """The unshared columns that one task alone reaches."""
        return [c for c in self.columns if c.own is not None]

    @cached_property
    def adds_up(self) -> bool:
        """Whether several tasks reach an unshared parameter, so that their gradients are added up."""
        return any(c.segment is None and c.own is None for c in self.columns)

    def chosen(self, numbers: tuple[int, ...]) -> Batch:
        """Return some of the columns as a batch, by their numbers among the columns."""
        if numbers not in self._chosen:
            make_room(self._chosen)
            self._chosen[numbers] = Batch([self.columns[k] for k in numbers], self.n_segments, self.n)
        return self._chosen[numbers]

    @cached_property
    def combined(self) -> "Arrangement":
        """The arrangement of a single row, the combination of these."""
        columns = [c._replace(tasks=(0,), segment=None, unit=-1, sparse=False) for c in self.columns]
        return Arrangement(columns, self.n, 0)

    def of(self, columns: Iterable[Column]) -> "Arrangement":
        """Return the arrangement of other columns of the same rows."""
        return Arrangement(list(columns), self.n, self.n_segments)

    def _batches(self, columns: Iterable[Column]) -> list[Batch]:
        by_dtype: dict[torch.dtype, list[Column]] = {}
        for c in columns:
            by_dtype.setdefault(c.dtype, []).append(c)
        return [Batch(of_dtype, self.n_segments, self.n) for of_dtype in by_dtype.values()]


@lru_cache(maxsize=PLANS)
def arranged(
    layouts: Layouts,
    reach: Reach,
    groups: tuple[int, ...],
    n_segments: int,
    shared: tuple[bool, ...] | None,
    units: tuple[int, ...] | None,
) -> Arrangement:
    """Return the arrangement of n parameters.

    Args:
        layouts: their layouts.
        reach: the layouts of their T gradients.
        groups: the group of each.
        n_segments: S, the number of groups.
        shared: whether each is shared; None if those that two tasks reach are.
        units: the first unit of suppression of each; None without suppression.
    """
    columns, mixed = [], []
    for k, kinds in enumerate(zip(*reach, strict=True)):
        tasks = tuple(t for t, kind in enumerate(kinds) if kind is not None)
        if not tasks:
            continue
        is_shared = len(tasks) > 1 if shared is None else shared[k]
        sparse = all(kinds[t] == torch.sparse_coo for t in tasks)
        if not sparse and torch.sparse_coo in kinds:
            mixed.append(k)
        unit = units[k] if units is not None and is_shared else -1
        segment = groups[k] if is_shared else None
        is_complex = layouts.complex is not None and layouts.complex[k]
        columns.append(Column(k, layouts.numels[k], layouts.dtypes[k], tasks, segment, unit, sparse, is_complex))
    return Arrangement(columns, len(groups), n_segments, mixed)
