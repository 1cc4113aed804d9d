"""The whole surgery of matrices in one call, in PyTorch.

It does little between the two passes over a matrix, because each pass leaves the caches cold, and doubles the time of
the work after it.
"""

from collections.abc import Sequence

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
    dtype = blocks[0].dtype
    wide = [widened(block) for block in blocks]
    sums = [_few_products(X) for X in wide]
    M = wide[0].new_tensor(sums) if None not in sums else torch.stack([matrix_gramian(X) for X in wide])
    w = _weights(M, method)
    return M, w, [combine_matrix(X, w_s).to(dtype) for X, w_s in zip(wide, w.unbind(), strict=True)]


def _few_products(X: Tensor) -> list[list[float]] | None:
    """Compute X Xᵀ, (T, T), and add up the products of its chunks in plain floats; return None if they are many."""
    T, P = X.shape
    of_columns = cut(T, P, X.itemsize)
    n = of_columns.chunks
    if P == 0 or of_columns.rest or n * T * T > FEW_PRODUCTS or not lies_as_scratch(X, of_columns, compute_dtype(X)):
        return None
    chunks, _ = batch(X, of_columns.width, n)
    terms = products_of(chunks, chunks)[:n].view(n, T * T).tolist()
    sums = [sum(of_entry) for of_entry in zip(*terms, strict=True)]
    # Half of them, because a BLAS may sum up M_ij and M_ji in different orders.
    return [[sums[max(i, j) * T + min(i, j)] for j in range(T)] for i in range(T)]


def _weights(M: Tensor, method: ProjectionArguments) -> Tensor:
    """Return the weights (S, T) of Gramians (S, T, T); targets move unless a dot product is not finite."""
    keys, partner, targets, update_mask, beta, mean = method
    if targets is not None:
        assert keys is not None
        assert update_mask is not None
        C = gradvac(M, keys, targets, update_mask & M.isfinite().all(), beta)
    elif len(M) == 1:
        return M.new_tensor([pcgrad_weights(M[0], keys, partner, mean)])
    else:
        C = torch.from_numpy(pcgrad_coefficients(M, keys, partner)).to(M)
    return C.mean(-2) if mean else C.sum(-2)
