"""The operators in plain PyTorch: the CPU's back end, and any device's that has no kernels of its own."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradkern.ops.blocks import BLOCK, converted, flat, widened
from gradkern.ops.offsets import column_bounds
from gradkern.ops.products import matrix_gramian, segment_gramians, work_dtype
from gradkern.ops.registration import operator
from gradkern.ops.schema import arithmetic_dtype

COLUMNS = 1 << 21
"""Columns combined at a time: 8 MB of a running sum that stays in the third cache while the rows pass by. An eighth of
that, which stays in the second, took a third longer: each operation, that much shorter, waits more for its threads."""


@operator("gramian")
def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """M = J Jᵀ, per segment."""
    if offsets is None:
        return matrix_gramian(J)
    bounds = column_bounds(offsets, J.shape[1])
    return torch.stack([matrix_gramian(J[:, a:b]) for a, b in pairwise(bounds)])


@operator("gramian.tensors")
def gramian_tensors(grads: Sequence[Tensor | None], segments: Sequence[int], n_segments: int) -> Tensor:
    """M = J Jᵀ, per segment, of the rows that the tensors of a segment form one after another."""
    return segment_gramians(grads, segments, n_segments)


@operator("cross")
def cross(A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    """A Bᵀ, per segment: a corner of the Gramian of both matrices' rows, on whatever back end that has."""
    bounds = column_bounds(offsets, A.shape[1])
    pieces = [row[a:b] for row in (*A, *B) for a, b in pairwise(bounds)]
    n_segments = len(bounds) - 1
    M = torch.ops.gradkern.gramian(pieces, list(range(n_segments)), n_segments)
    K = M[:, : len(A), len(A) :].contiguous()
    return K[0] if offsets is None else K


@operator("combine")
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """g = wᵀ J, per segment. A row whose weight is 0 is not read."""
    T, P = J.shape
    if offsets is None:
        return combine_matrix(widened(J), w.reshape(T)).to(J.dtype)
    out = J.new_empty(P)
    bounds = column_bounds(offsets, P)
    for (a, b), of_segment in zip(pairwise(bounds), w.reshape(-1, T), strict=True):
        combine_matrix(J[:, a:b], of_segment, out[a:b])
    return out


def combine_matrix(J: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """wᵀ J, in ``out`` if that is given. A row whose weight is 0 is not read."""
    weights = w.tolist()
    if w.dtype == J.dtype == work_dtype(J) and 0.0 not in weights:
        return torch.mv(J.t(), w, out=out)
    if out is None:
        out = J.new_empty(J.shape[1])
    combine_flat(list(J), weights, out)
    return out


@operator("combine.tensors")
def combine_tensors(grads: Sequence[Tensor | None], w: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[k] = Σ_t w[segments[k], t] grads[t, k]. A tensor whose weight is 0 is not read."""
    n = len(out)
    weights = w.tolist()
    for k in range(n):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        combine_flat(rows, weights[segments[k]], flat(out[k]))


def combine_flat(rows: Sequence[Tensor | None], weights: Sequence[float], out: Tensor) -> None:
    """out = Σ_t weights[t] rows[t], all of one dimension; a row of weight 0 is not read."""
    terms = [(row, w) for row, w in zip(rows, weights, strict=True) if row is not None and w != 0.0]
    if not terms:
        out.zero_()
        return
    # A row that ``out`` stands in is read before it is written if it is the first, and otherwise not.
    apart = arithmetic_dtype(out.dtype) != out.dtype or any(row.data_ptr() == out.data_ptr() for row, _ in terms[1:])
    if len(out) <= COLUMNS:
        _weighted_sum(terms, out, apart)
        return
    for a in range(0, len(out), COLUMNS):
        b = a + COLUMNS
        _weighted_sum([(row[a:b], w) for row, w in terms], out[a:b], apart)


def _weighted_sum(terms: list[tuple[Tensor, float]], out: Tensor, apart: bool) -> None:
    """``out`` of some terms that stay in cache; ``apart`` sums up in other memory, in arithmetic dtype."""
    work = arithmetic_dtype(out.dtype)
    total = torch.empty_like(out, dtype=work) if apart else out
    (first, weight), *others = terms
    torch.mul(first.to(work), weight, out=total)
    for row, weight in others:
        total.add_(row.to(work), alpha=weight)
    if apart:
        out.copy_(total)


@operator("project")
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """W J, per segment."""
    out = J.new_empty((W.shape[-2], J.shape[1]))
    bounds = column_bounds(offsets, J.shape[1])
    weights = W.reshape(-1, *W.shape[-2:])
    for (a, b), Ws in zip(pairwise(bounds), weights, strict=True):
        _project(J[:, a:b], Ws, out[:, a:b])
    return out


@operator("project.tensors")
def project_tensors(grads: Sequence[Tensor | None], W: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[r, k] = Σ_t W[segments[k], r, t] grads[t, k]; ``out`` is row-major, R x n."""
    n = len(segments)
    for k in range(n):
        outs = [flat(o) for o in out[k::n]]
        rows = [torch.zeros_like(outs[0]) if g is None else flat(g) for g in grads[k::n]]
        product = outs[0].new_empty((len(outs), len(outs[0])))
        _project(torch.stack(rows), W[segments[k]], product)
        for o, row in zip(outs, product, strict=True):
            o.copy_(row)


def _project(J: Tensor, W: Tensor, out: Tensor) -> None:
    work = work_dtype(J)
    W = W.to(work)
    if work == J.dtype:
        torch.mm(W, J, out=out)
        return
    step = BLOCK // len(J)
    for a, X in zip(range(0, out.shape[1], step), converted(J, work, step), strict=False):
        out[:, a : a + step] = W @ X
