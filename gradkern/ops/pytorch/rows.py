"""The operators in plain PyTorch: the CPU's back end, and any device's that has no kernels of its own."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradkern.ops.offsets import column_bounds
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.chunks import BLOCK
from gradkern.ops.pytorch.combination import combine_flat, combine_matrix
from gradkern.ops.pytorch.gramian import matrix_gramian, segment_gramians
from gradkern.ops.registration import operator
from gradkern.ops.schema import arithmetic_dtype


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


def widened(J: Tensor) -> Tensor:
    """J in arithmetic dtype, where all of it then fits into a block; else J."""
    wanted = arithmetic_dtype(J.dtype)
    return J if J.dtype == wanted or J.numel() > BLOCK else J.to(wanted)


@operator("combine.tensors")
def combine_tensors(grads: Sequence[Tensor | None], w: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[k] = Σ_t w[segments[k], t] grads[t, k]. A tensor whose weight is 0 is not read."""
    n = len(out)
    weights = w.tolist()
    for k in range(n):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        combine_flat(rows, weights[segments[k]], flat(out[k]))


@operator("project")
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """W J, per segment: each row of it is a combination."""
    X = widened(J)
    bounds = column_bounds(offsets, J.shape[1])
    weights = W.reshape(-1, *W.shape[-2:])
    of_segments = [
        torch.stack([combine_matrix(X[:, a:b], w) for w in Ws])
        for (a, b), Ws in zip(pairwise(bounds), weights, strict=True)
    ]
    return torch.cat(of_segments, 1).to(J.dtype)


@operator("project.tensors")
def project_tensors(grads: Sequence[Tensor | None], W: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[r, k] = Σ_t W[segments[k], r, t] grads[t, k]; ``out`` is row-major, R x n."""
    n = len(segments)
    weights = W.tolist()
    for k, s in enumerate(segments):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        for of_row, target in zip(weights[s], out[k::n], strict=True):
            combine_flat(rows, of_row, flat(target))
