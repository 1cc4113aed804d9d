"""The task gradients of a step, read where autograd left them.

Autograd promises no layout: a gradient may be expanded, permuted, sparse, or share its storage with another. One that
lies as its parameter does is read in place; any other is copied to the parameter's strides, that one alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.ops import autograd  # noqa: F401  (registers the operators)
from gradkern.ops.schema import arithmetic_dtype

ops = torch.ops.gradkern


@dataclass(frozen=True)
class Column:
    """One parameter's T gradients, None where a task does not reach it.

    Attributes:
        dtype: of the gradients, and so of ``.grad``.
        segment: the parameter's group, or None for one outside surgery, which gets the plain sum.
        sparse: all gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
    """

    param: Tensor
    grads: list[Tensor | None]
    dtype: torch.dtype
    segment: int | None
    sparse: bool


def readable(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """One task's gradients, those copied that do not lie as a new ``.grad`` would; sparse ones stay as they are.

    To be called pass by pass: then no more than one task's gradients are ever alive beside their copies.
    """
    return [None if g is None else _readable(g, p) for g, p in zip(grads, params, strict=True)]


def columns(
    params: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], segments: Sequence[int | None]
) -> list[Column]:
    """The columns of all parameters that any task reaches; ``grads[t][k]`` belongs to task t and ``params[k]``."""
    found = []
    for k, (p, segment) in enumerate(zip(params, segments, strict=True)):
        column = [row[k] for row in grads]
        present = [g for g in column if g is not None]
        if not present:
            continue
        sparse = all(g.is_sparse for g in present)
        if not sparse and any(g.is_sparse for g in present):
            column = [_laid_out(g, p) if g is not None and g.is_sparse else g for g in column]
        found.append(Column(p, column, _grad_dtype(p), segment, sparse))
    return found


def gramian(columns: Sequence[Column], n_tasks: int, n_segments: int, device: torch.device) -> Tensor:
    """(S, T, T), the dot products of the task gradients within each group; float64 if any gradient is."""
    under_surgery = [c for c in columns if c.segment is not None]
    parts = [
        ops.gramian(_row_major(group), [c.segment for c in group], n_segments)
        for group in _by_dtype([c for c in under_surgery if not c.sparse])
    ]
    wide = any(c.dtype == torch.float64 for c in under_surgery)
    zeros = torch.zeros((n_segments, n_tasks, n_tasks), dtype=torch.float64 if wide else torch.float32, device=device)
    M = sum(parts, zeros)
    for c in under_surgery:
        if c.sparse:  # dense for as long as its dot products take, one parameter at a time
            M[c.segment] += ops.gramian([None if g is None else g.to_dense() for g in c.grads], [0], 1)[0]
    return M


def combine(columns: Sequence[Column], w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with Σ_t w[segment, t] g_t, newly allocated; the plain sum for one outside surgery.

    Args:
        columns: as :func:`columns` gives them.
        w: (S, T), the weights of each group.
    """
    plain = len(w)
    w = torch.cat((w, torch.ones_like(w[:1])))
    results: dict[Tensor, Tensor] = {}
    for group in _by_dtype([c for c in columns if not c.sparse]):
        out = [torch.empty_like(c.param, dtype=c.dtype) for c in group]
        segments = [plain if c.segment is None else c.segment for c in group]
        ops.combine(_row_major(group), w.to(arithmetic_dtype(out[0].dtype)), segments, out)
        results.update(zip((c.param for c in group), out, strict=True))
    for c in columns:
        if c.sparse:
            results[c.param] = _combine_sparse(c, w[plain if c.segment is None else c.segment])
    return [(c.param, results[c.param]) for c in columns]


def _by_dtype(columns: Sequence[Column]) -> list[list[Column]]:
    groups: dict[torch.dtype, list[Column]] = defaultdict(list)
    for c in columns:
        groups[c.dtype].append(c)
    return list(groups.values())


def _row_major(columns: Sequence[Column]) -> list[Tensor | None]:
    return [g for row in zip(*(c.grads for c in columns), strict=True) for g in row]


def _combine_sparse(c: Column, w: Tensor) -> Tensor:
    """The entries of all tasks one after another, each scaled; equal indices add up when torch next coalesces."""
    present = [(t, g) for t, g in enumerate(c.grads) if g is not None]
    indices = torch.cat([g._indices() for _, g in present], 1)
    values = torch.cat([torch.where(w[t] == 0, 0.0, w[t] * g._values()).to(g.dtype) for t, g in present])
    return torch.sparse_coo_tensor(indices, values, c.param.shape, check_invariants=False)


def added(total: Tensor | None, g: Tensor) -> Tensor:
    """``total + g``, in a new tensor, whichever of them is sparse."""
    if total is None:
        return g
    return g + total if total.is_sparse else total + g  # a sparse tensor cannot take a dense one in


def owned(g: Tensor, p: Tensor) -> Tensor:
    """A copy of ``g`` that nobody else holds, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.is_sparse else _laid_out(g, p)


def _readable(g: Tensor, p: Tensor) -> Tensor:
    if g.is_sparse:
        return g
    in_place = g.layout == torch.strided and g.stride() == _new_grad_stride(p) and g.dtype == _grad_dtype(p)
    return g if in_place and not g.is_neg() else _laid_out(g, p)


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p, dtype=_grad_dtype(p)).copy_(g if g.layout == torch.strided else g.to_dense())


def _new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """What torch gives a new ``.grad``: the parameter's own strides where it is dense, else a contiguous tensor's."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def _grad_dtype(p: Tensor) -> torch.dtype:
    """What ``.grad`` is stored in; since torch 2.10 a parameter may ask for another dtype than its own."""
    return getattr(p, "grad_dtype", None) or p.dtype
