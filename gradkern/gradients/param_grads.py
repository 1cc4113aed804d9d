"""The task gradients of a step, grouped by parameter and read where autograd left them.

Autograd promises no layout: a gradient may be expanded, permuted, sparse, or share its storage with another. A gradient
with its parameter's strides is read in place. Any other gradient is copied to the parameter's strides.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParamGrads:
    """The T gradients of one parameter, None where a task does not reach it.

    Attributes:
        dtype: the dtype of the gradients, and so of ``.grad``.
        segment: the parameter's group, or None for an unshared parameter, which gets the sum of its gradients.
        unit: the number of the parameter's first unit of gradient suppression; -1 if it is never masked.
        sparse: whether all gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
        free: a gradient that may be overwritten with the result; None if all are needed elsewhere.
    """

    param: Tensor
    grads: list[Tensor | None]
    dtype: torch.dtype
    segment: int | None
    unit: int
    sparse: bool
    free: Tensor | None

    @property
    def own(self) -> Tensor | None:
        """The only gradient of an unshared parameter that one task alone reaches; None for any other parameter."""
        present = [g for g in self.grads if g is not None]
        return present[0] if self.segment is None and len(present) == 1 else None

    def result(self) -> Tensor:
        """Return memory for the result, laid out as a new ``.grad``: a free gradient's, or new memory."""
        return torch.empty_like(self.param, dtype=self.dtype) if self.free is None else self.free

    def dense(self) -> "ParamGrads":
        """Return these gradients, with dense copies of sparse ones."""
        if not self.sparse:
            return self
        return replace(self, grads=[None if g is None else laid_out(g, self.param) for g in self.grads], sparse=False)


@dataclass(frozen=True)
class Placement:
    """The groups and the suppression units of n parameters.

    Attributes:
        segments: the group of each parameter, None for an unshared one.
        units: the number of each parameter's first unit of suppression.
    """

    segments: Sequence[int | None]
    units: Sequence[int]


def readable(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return one task's gradients, with copies of those whose layout differs from that of a new ``.grad``.

    Sparse ones stay as they are. Call it after each backward pass, so that at most one task's gradients are alive
    beside their copies.
    """
    return [None if g is None else _readable(g, p) for g, p in zip(grads, params, strict=True)]


def by_parameter(
    params: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], places: Placement, overwrite: bool
) -> list[ParamGrads]:
    """Return the gradients of all parameters that any task reaches.

    Args:
        params: n parameters.
        grads: ``grads[t][k]`` is the gradient of task t for ``params[k]``, as :func:`readable` returns it. A source's
            passes have already copied the gradients that something else refers to.
        places: the groups and units of the parameters.
        overwrite: whether ``grads`` may be overwritten once they are combined.
    """
    occurrences = Counter(id(g) for row in grads for g in row)
    columns = []
    for k, (p, segment) in enumerate(zip(params, places.segments, strict=True)):
        column = [row[k] for row in grads]
        present = [g for g in column if g is not None]
        if not present:
            continue
        sparse = all(g.is_sparse for g in present)
        if not sparse and any(g.is_sparse for g in present):
            column = [laid_out(g, p) if g is not None and g.is_sparse else g for g in column]
        unit = -1 if segment is None else places.units[k]
        free = None
        if overwrite and not sparse:
            free = next((g for g in present if occurrences[id(g)] == 1 and owns_its_storage(g)), None)
        columns.append(ParamGrads(p, column, _grad_dtype(p), segment, unit, sparse, free))
    return columns


def row_major(columns: Sequence[ParamGrads]) -> list[Tensor | None]:
    """Return all gradients in one list, task by task, as the operators take them."""
    return [g for row in zip(*(c.grads for c in columns), strict=True) for g in row]


def own_gradients(columns: Sequence[ParamGrads]) -> dict[Tensor, Tensor]:
    """Return the results of unshared parameters that one task alone reaches: its gradients."""
    single = [(c, own) for c in columns if (own := c.own) is not None]
    return {c.param: owned(own, c.param) if c.free is None else own for c, own in single}


def owns_its_storage(g: Tensor) -> bool:
    """Return whether ``g``, a tensor with no other references, fills its storage and PyTorch manages that storage."""
    if g.is_sparse:
        return False
    storage = g.untyped_storage()
    return storage.nbytes() == g.nbytes and storage.resizable()


def added(total: Tensor | None, g: Tensor) -> Tensor:
    """Return ``total + g``, where either may be sparse; ``g`` itself if ``total`` is None."""
    if total is None:
        return g
    return g + total if total.is_sparse else total + g  # torch does not add a dense tensor to a sparse one


def owned(g: Tensor, p: Tensor) -> Tensor:
    """Return a copy of ``g`` with its own memory, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.is_sparse else laid_out(g, p)


def new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """Return the strides of a new ``.grad``: the parameter's own if it is dense, else a contiguous tensor's."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def laid_out(g: Tensor, p: Tensor) -> Tensor:
    """Return a dense copy of ``g``, laid out as a new ``.grad`` of ``p``."""
    return torch.empty_like(p, dtype=_grad_dtype(p)).copy_(g if g.layout == torch.strided else g.to_dense())


def _readable(g: Tensor, p: Tensor) -> Tensor:
    if g.is_sparse:
        return g
    in_place = g.layout == torch.strided and g.stride() == new_grad_stride(p) and g.dtype == _grad_dtype(p)
    return g if in_place and not g.is_neg() else laid_out(g, p)


def _grad_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of ``.grad``; since torch 2.10 it may differ from the parameter's own dtype."""
    return getattr(p, "grad_dtype", None) or p.dtype
