"""The layouts of a step's parameters and of their gradients, remembered from step to step.

They are found again by a comparison with those of the steps before, or by their value. They keep no tensor alive.
"""

from collections.abc import Sequence
from operator import attrgetter
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
    arrangements: set[Any]
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
