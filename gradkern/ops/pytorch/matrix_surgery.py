"""The whole surgery of a matrix in one call, in PyTorch.

It does little between the two passes over the matrix, because each pass leaves the caches cold, and doubles the time of
the work after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.combination import combine_matrix, widened
from gradkern.ops.pytorch.gramian import matrix_gramian
from gradkern.ops.pytorch.host_programs import gradvac, pcgrad_coefficients, pcgrad_weights


@implements(operators.surgery_blocks)
def surgery_blocks(blocks: Sequence[Tensor], method: ProjectionArguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute Gramians, weights and combinations."""
    wide = [widened(block) for block in blocks]
    M = torch.stack([matrix_gramian(block) for block in wide])
    w = weights(M, method)
    return M, w, [combine_matrix(X, of_block).to(blocks[0].dtype) for X, of_block in zip(wide, w, strict=True)]


def weights(M: Tensor, method: ProjectionArguments) -> Tensor:
    """Return the weights (S, T) of Gramians (S, T, T); targets move unless a dot product is not finite."""
    keys, partner, targets, update_mask, beta, mean = method
    if targets is not None:
        assert keys is not None
        assert update_mask is not None
        C = gradvac(M, keys, targets, update_mask & M.isfinite().all(), beta)
    elif len(M) == 1:
        w = pcgrad_weights(M[0], keys, partner)
        return M.new_tensor([[x / len(w) for x in w] if mean else w])
    else:
        C = torch.from_numpy(pcgrad_coefficients(M, keys, partner)).to(M)
    return C.mean(-2) if mean else C.sum(-2)
