"""The whole surgery of matrices in one call, in PyTorch.

It does little between the two passes over a matrix, because each pass leaves the caches cold, and doubles the time of
the work after it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.chunks import batch, cut
from gradkern.ops.pytorch.combination import combine_matrix, widened
from gradkern.ops.pytorch.gramian import compute_dtype, matrix_gramian
from gradkern.ops.pytorch.host_programs import gradvac, pcgrad_coefficients, pcgrad_weights
from gradkern.ops.pytorch.observed import lies_as_scratch, products_of

FEW_PRODUCTS = 512
"""The count of numbers in the products of all chunks up to which Python adds them up sooner than NumPy."""


@implements(operators.surgery_blocks)
def surgery_blocks(blocks: Sequence[Tensor], method: ProjectionArguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute Gramians, weights and combinations."""
    dtype, T = blocks[0].dtype, blocks[0].shape[0]
    wide = list(map(widened, blocks))
    sums = list(map(_few_products, wide))
    M = torch.stack(list(map(matrix_gramian, wide))) if None in sums else wide[0].new_tensor(sums).view(-1, T, T)
    w = _weights(M, method)
    return M, w, [g.to(dtype) for g in map(combine_matrix, wide, w.unbind())]


def _few_products(X: Tensor) -> Sequence[float] | None:
    """Compute X Xᵀ, (T, T), row by row, in plain floats; return None if there are many products of chunks."""
    T, P = X.shape
    of_columns = cut(T, P, X.itemsize)
    n = of_columns.chunks
    if P == 0 or of_columns.rest or n * T * T > FEW_PRODUCTS or not lies_as_scratch(X, of_columns, compute_dtype(X)):
        return None
    chunks, _ = batch(X, of_columns.width, n)
    terms = products_of(chunks, chunks)[:n].view(n, T * T).tolist()
    return _symmetric(T)(list(map(sum, zip(*terms, strict=True))))


@cache
def _symmetric(T: int) -> Callable[[list[float]], Sequence[float]]:
    """Return a function that mirrors the lower half of T x T numbers, one after another, into the upper half.

    A BLAS may sum up M_ij and M_ji in different orders.
    """
    if T == 1:
        return lambda sums: sums
    return itemgetter(*(max(i, j) * T + min(i, j) for i in range(T) for j in range(T)))


def _weights(M: Tensor, method: ProjectionArguments) -> Tensor:
    """Return the weights (S, T) of Gramians (S, T, T); targets move unless a dot product is not finite."""
    keys, partner, targets, update_mask, beta, mean = method
    if targets is not None:
        assert keys is not None
        assert update_mask is not None
        C = gradvac(M, keys, targets, update_mask & M.isfinite().all(), beta)
    elif M.shape[0] == 1:
        return M.new_tensor([pcgrad_weights(M[0], keys, partner, mean)])
    else:
        C = torch.from_numpy(pcgrad_coefficients(M, keys, partner)).to(M)
    return C.mean(-2) if mean else C.sum(-2)
