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
        segment: the parameter's group, or None for one outside surgery, which gets the plain sum.
        sparse: all gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
    """

    param: Tensor
    grads: list[Tensor | None]
    segment: int | None
    sparse: bool


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
        sparse = all(g.layout == torch.sparse_coo for g in present)
        if not sparse:
            stride = _new_grad_stride(p)
            column = [None if g is None else _readable(g, p, stride) for g in column]
        found.append(Column(p, column, segment, sparse))
    return found


def gramian(columns: Sequence[Column], n_tasks: int, n_segments: int, device: torch.device) -> Tensor:
    """(S, T, T), the dot products of the task gradients within each group; float64 if any gradient is."""
    under_surgery = [c for c in columns if c.segment is not None]
    parts = [
        ops.gramian(_row_major(group), [c.segment for c in group], n_segments)
        for group in _by_dtype([c for c in under_surgery if not c.sparse])
    ]
    M = sum(parts[1:], parts[0]) if parts else torch.zeros((n_segments, n_tasks, n_tasks), device=device)
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
        out = [torch.empty_like(c.param) for c in group]
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
        groups[c.param.dtype].append(c)
    return list(groups.values())


def _row_major(columns: Sequence[Column]) -> list[Tensor | None]:
    return [g for row in zip(*(c.grads for c in columns), strict=True) for g in row]


def _combine_sparse(c: Column, w: Tensor) -> Tensor:
    """The entries of all tasks one after another, each scaled; equal indices add up when torch next coalesces."""
    present = [(t, g) for t, g in enumerate(c.grads) if g is not None]
    indices = torch.cat([g._indices() for _, g in present], 1)
    values = torch.cat([torch.where(w[t] == 0, 0.0, w[t] * g._values()).to(g.dtype) for t, g in present])
    return torch.sparse_coo_tensor(indices, values, c.param.shape, check_invariants=False)


def owned(g: Tensor, p: Tensor) -> Tensor:
    """A copy of ``g`` that nobody else holds, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.layout == torch.sparse_coo else _laid_out(g, p)


def _readable(g: Tensor, p: Tensor, stride: tuple[int, ...]) -> Tensor:
    in_place = g.layout == torch.strided and g.stride() == stride and not g.is_neg()
    return g if in_place else _laid_out(g, p)


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p).copy_(g if g.layout == torch.strided else g.to_dense())


def _new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """What torch gives a new ``.grad``: the parameter's own strides where it is dense, else a contiguous tensor's."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()
