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
from gradkern.ops.pytorch.host_programs import FEW, few, gradvac, pcgrad_coefficients
from gradkern.ops.pytorch.observed import lies_as_scratch, products_of

FEW_PRODUCTS = 512
"""The count of numbers in the products of all chunks up to which Python adds them up sooner than NumPy."""


@implements(operators.surgery_blocks)
def surgery_blocks(blocks: Sequence[Tensor], method: ProjectionArguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute Gramians, weights and combinations."""
    dtype = blocks[0].dtype
    wide = [widened(block) for block in blocks]
    found = _of_few_numbers(wide[0], method) if len(blocks) == 1 else None
    if found is None:
        M = torch.stack([matrix_gramian(X) for X in wide])
        w = _weights(M, method)
    else:
        M, w = found
    return M, w, [combine_matrix(X, w_s).to(dtype) for X, w_s in zip(wide, w.unbind(), strict=True)]


def _weights(M: Tensor, method: ProjectionArguments) -> Tensor:
    """Return the weights (S, T) of Gramians (S, T, T); targets move unless a dot product is not finite."""
    keys, partner, targets, update_mask, beta, mean = method
    if targets is None:
        C = torch.from_numpy(pcgrad_coefficients(M, keys, partner)).to(M)
    else:
        assert keys is not None
        assert update_mask is not None
        C = gradvac(M, keys, targets, update_mask & M.isfinite().all(), beta)
    return C.mean(-2) if mean else C.sum(-2)


def _of_few_numbers(X: Tensor, method: ProjectionArguments) -> tuple[Tensor, Tensor] | None:
    """Return PCGrad's Gramian (1, T, T) and weights (1, T), computed in plain floats; None for many numbers."""
    T, P = X.shape
    of_columns = cut(T, P, X.itemsize)
    n, keys = of_columns.chunks, method.order_keys
    if keys is None or method.partner != "all" or method.targets is not None:
        return None
    if of_columns.rest or T > FEW or n * T * T > FEW_PRODUCTS or P == 0:
        return None
    if not lies_as_scratch(X, of_columns, compute_dtype(X)):
        return None
    chunks, _ = batch(X, of_columns.width, n)
    terms = products_of(chunks, chunks)[:n].view(n, T * T).tolist()
    sums = [sum(of_entry) for of_entry in zip(*terms, strict=True)]
    M = [
        [sums[max(i, j) * T + min(i, j)] for j in range(T)] for i in range(T)
    ]  # a BLAS may give M_ij and M_ji other bits
    C = few(M, keys.tolist()[0], T - 1)
    w = [sum(column) / T if method.mean else sum(column) for column in zip(*C, strict=True)]
    return X.new_tensor([M]), X.new_tensor([w])
