"""The task gradients of a step by parameter, read where autograd left them.

Autograd promises no layout: a gradient may be expanded, permuted, sparse, or share its storage with another. One that
lies as its parameter does is read in place; any other is copied to the parameter's strides, that one alone.
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
        dtype: of the gradients, and so of ``.grad``.
        segment: the parameter's group, or None for an unshared one, which gets the plain sum.
        unit: the number of the first unit of gradient suppression in it; -1 for one that is never masked.
        sparse: all gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
        free: one of the gradients, to be overwritten with the result; None if all are needed elsewhere.
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
        """The one gradient of an unshared parameter that one task alone reaches."""
        present = [g for g in self.grads if g is not None]
        return present[0] if self.segment is None and len(present) == 1 else None

    def result(self) -> Tensor:
        """Return memory for the result, laid out as a new ``.grad``: that of a free gradient, else new."""
        return torch.empty_like(self.param, dtype=self.dtype) if self.free is None else self.free

    def dense(self) -> "ParamGrads":
        """Return the same, with sparse gradients made dense."""
        if not self.sparse:
            return self
        return replace(self, grads=[None if g is None else laid_out(g, self.param) for g in self.grads], sparse=False)


@dataclass(frozen=True)
class Placement:
    """The places of n parameters in a step.

    Attributes:
        segments: the group of each parameter, None for an unshared one.
        units: the first unit of suppression of each parameter.
    """

    segments: Sequence[int | None]
    units: Sequence[int]


def readable(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return one task's gradients, with copies of those that do not lie as a new ``.grad`` would.

    Sparse ones stay as they are. To be called pass by pass: then no more than one task's gradients are ever alive
    beside their copies.
    """
    return [None if g is None else _readable(g, p) for g, p in zip(grads, params, strict=True)]


def by_parameter(
    params: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], places: Placement, overwrite: bool
) -> list[ParamGrads]:
    """Return the gradients of all parameters that any task reaches.

    Args:
        params: n parameters.
        grads: ``grads[t][k]`` belongs to task t and ``params[k]``; as :func:`readable` gives those of a source's
            passes, which copy gradients that somebody else holds.
        places: where the parameters belong.
        overwrite: whether nobody needs ``grads`` once they are combined.
    """
    times = Counter(id(g) for row in grads for g in row)
    found = []
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
            free = next((g for g in present if times[id(g)] == 1 and has_its_memory_alone(g)), None)
        found.append(ParamGrads(p, column, _grad_dtype(p), segment, unit, sparse, free))
    return found


def row_major(columns: Sequence[ParamGrads]) -> list[Tensor | None]:
    """Return the gradients task by task, as the operators take them."""
    return [g for row in zip(*(c.grads for c in columns), strict=True) for g in row]


def own_gradients(columns: Sequence[ParamGrads]) -> dict[Tensor, Tensor]:
    """Return the results of the parameters that one task alone reaches: their gradients themselves."""
    alone = [(c, own) for c in columns if (own := c.own) is not None]
    return {c.param: owned(own, c.param) if c.free is None else own for c, own in alone}


def has_its_memory_alone(g: Tensor) -> bool:
    """Return whether ``g``, which nobody else holds, is no part of a larger tensor, and its memory is PyTorch's."""
    if g.is_sparse:
        return False
    storage = g.untyped_storage()
    return storage.nbytes() == g.nbytes and storage.resizable()


def added(total: Tensor | None, g: Tensor) -> Tensor:
    """Return ``total + g`` in a new tensor, whichever of them is sparse."""
    if total is None:
        return g
    return g + total if total.is_sparse else total + g  # a sparse tensor cannot take a dense one in


def owned(g: Tensor, p: Tensor) -> Tensor:
    """Return a copy of ``g`` that nobody else holds, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.is_sparse else laid_out(g, p)


def new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """Return the strides of a new ``.grad``: the parameter's own where it is dense, else a contiguous tensor's."""
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
    """Return the dtype of ``.grad``; since torch 2.10 a parameter may ask for another one than its own."""
    return getattr(p, "grad_dtype", None) or p.dtype
