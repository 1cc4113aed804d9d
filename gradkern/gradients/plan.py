"""The plan of a step: what follows from its parameters' layouts, and from which of them each task reaches.

A plan is remembered. Its key is all that it depends on: the parameters' shapes, strides, dtypes and devices, which of
them require grad, their groups, and which task reaches which of them. A change in any of these makes another key, so a
remembered plan is never out of date. It keeps no tensor alive.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from gradkern.gradients.recognition import Comparison, comparison_with, unlike
from gradkern.ops.dtypes import arithmetic_dtype

PLANS = 64
"""The number of sets of parameters, and of arrangements, that are remembered; each has .2 KB for a parameter."""

Row = Sequence[Tensor | None]
"""The gradients of one task, None for a parameter that it does not reach."""
RowReach = tuple[torch.layout | None, ...]
"""The layouts of the gradients of one task, None for a parameter that it does not reach."""
Reach = tuple[RowReach, ...]
"""The same of T tasks."""

_IS_NESTED = attrgetter("is_nested")
_VALUES = attrgetter("shape", "dtype", "device", "grad_dtype", "requires_grad")


def make_room(remembered: dict[Any, Any] | set[Any], most: int = PLANS) -> None:
    """Clear what is remembered if it is full; it is worked out anew when it is needed."""
    if len(remembered) >= most:
        remembered.clear()


class Looks(NamedTuple):
    """The steps of a set of parameters that have been looked at for warnings."""

    first: "ref[Tensor]"
    """The first parameter, which tells the set from others of the same layouts."""
    arrangements: set["Arrangement"]
    """The arrangements of these steps."""


class Layouts:
    """The layouts of n parameters and of their gradients. Equal layouts are one object; :func:`layouts_of` returns it.

    A complex gradient is pairs of real numbers, as :func:`torch.view_as_real` shows it.

    Attributes:
        device: the device of all parameters.
        lazy: whether a parameter is of unknown shape, until its lazy module runs.
        complex: whether each is complex; None if none is.
        numels: the number of real elements of each.
        numel: the number of real elements of all.
        strides: the strides of a new ``.grad`` of each.
        dtypes: the dtype of each ``.grad``, a real one; it may differ from the parameter's.
        flattens: whether all parameters are contiguous, and their gradients of one dtype of 32 or 64 bits.
        all_dense: the layouts of n dense gradients.
        none: the layouts of no gradients.
        checked: whether a step has found parameters of these layouts permitted; they require grad then.
        looks: what has been looked at for warnings, by the first parameter's identity; see ``step/notices.py``.
        n_looks: how often the host has read gradients of these layouts for it.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.lazy = lazy = any(map(is_lazy, params))
        self.device = params[0].device
        are_complex = [p.is_complex() for p in params]
        self.complex = are_complex if True in are_complex else None
        self.numels = [0 if lazy else real_numel(p) for p in params]
        self.strides = [() if lazy else new_grad_stride(p) for p in params]
        self.dtypes = [grad_dtype(p) for p in params]
        self.checked = False
        self.looks: dict[int, Looks] = {}
        self.n_looks = 0
        self.all_dense: RowReach = (torch.strided,) * len(params)
        self.none: RowReach = (None,) * len(params)
        self._of_reached: dict[RowReach, tuple[list[tuple[int, ...]], list[torch.dtype]]] = {}
        self._is_like_usual: Comparison = unlike
        self.numel = sum(self.numels)
        one_dtype = len(set(self.dtypes)) == 1 and arithmetic_dtype(self.dtypes[0]) == self.dtypes[0]
        self.flattens = one_dtype and not lazy and not self.complex and all(p.is_contiguous() for p in params)

    def reach_of(self, row: Row) -> RowReach:
        """Return the layout of each gradient of a task, None for a parameter that the task does not reach."""
        return self.all_dense if self._is_like_usual(*row) else tuple([None if g is None else g.layout for g in row])

    def fitting_reach_of(self, row: Row) -> RowReach | None:
        """Return the reach of a task if all its gradients are dense and laid out as a new ``.grad``; else None."""
        if self._is_like_usual(*row):
            return self.all_dense
        reach, grads = self.reach_of(row), [g for g in row if g is not None]
        if not self._are_laid_out(grads, reach):
            return None
        if len(grads) == len(row):
            self._is_like_usual = comparison_with(grads)
        return reach

    def _are_laid_out(self, grads: Sequence[Tensor], reach: RowReach) -> bool:
        """Return whether all gradients of a reach are dense and laid out as a new ``.grad``.

        A list for each of their properties takes a third of the time of a loop over all properties of a gradient.
        """
        expected = self._of_reached.get(reach)
        if expected is None:
            if not {torch.strided, None}.issuperset(reach):
                return False
            reached = [k for k, kind in enumerate(reach) if kind is not None]
            expected = [self.strides[k] for k in reached], [self.dtypes[k] for k in reached]
            make_room(self._of_reached)
            self._of_reached[reach] = expected
        strides, dtypes = expected
        are_laid_out = [g.stride() for g in grads] == strides and [g.dtype for g in grads] == dtypes
        return are_laid_out and True not in map(Tensor.is_neg, grads)


def layouts_of(params: Sequence[Tensor]) -> Layouts:
    """Return the layouts of n >= 1 leaf tensors."""
    found = recognized(params)
    if found is not None:
        return found
    types = tuple(map(type, params))
    if UninitializedParameter in types:
        return Layouts(params)
    key = (types, tuple(map(_VALUES, params)), tuple([p.stride() for p in params]))
    found = _layouts.get(key)
    if found is None:
        make_room(_layouts)
        found = _layouts[key] = Layouts(params)
    make_room(_latest)
    _latest[len(params)] = comparison_with(params), [p.grad_dtype for p in params], found
    return found


def recognized(params: Sequence[Tensor]) -> Layouts | None:
    """Return the layouts of n tensors if they are leaves like the last n whose layouts were asked for; else None."""
    are_like, grad_dtypes, latest = _latest.get(len(params), _NONE)
    if True in map(_IS_NESTED, params) or not are_like(*params):  # a comparison with nested ones ends the process
        return None
    try:
        return latest if [p.grad_dtype for p in params] == grad_dtypes else None
    except RuntimeError:  # one is not a leaf
        return None


_NONE: tuple[Comparison, list[torch.dtype | None], None] = (unlike, [], None)
_layouts: dict[Any, Layouts] = {}
_latest: dict[int, tuple[Comparison, list[torch.dtype | None], Layouts | None]] = {}
"""The last layouts of n tensors, by n, with what the tensors are compared with."""


def fits_in(g: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether a gradient is dense, with the strides and dtype of a new ``.grad``."""
    return g.layout is torch.strided and g.stride() == stride and g.dtype is dtype and not g.is_neg()


def new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """Return the strides of a new ``.grad``: the parameter's own if it is dense, else a contiguous tensor's.

    For a complex parameter they are those of the gradient's pairs of real numbers.
    """
    stride = p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()
    return (*[2 * step for step in stride], 1) if p.is_complex() else stride


def grad_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the real numbers in ``.grad``, which may differ from the parameter's own dtype."""
    return (p.grad_dtype or p.dtype).to_real()


def real_numel(p: Tensor) -> int:
    """Return the number of a parameter's elements; a complex one counts as two."""
    return 2 * p.numel() if p.is_complex() else p.numel()


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
