"""The cosines of task gradients, from their Gramian."""

import torch
from torch import Tensor


def cosines(M: Tensor) -> Tensor:
    """Return φ_ij = M_ij / (√M_ii √M_jj), 0 where either gradient is zero: (..., T, T), of M's dtype."""
    norms = M.diagonal(dim1=-2, dim2=-1).sqrt()
    nonzero = (norms.unsqueeze(-1) != 0) & (norms.unsqueeze(-2) != 0)
    # Two divisions, because the product of two squared norms can overflow. Clamped, because it can underflow too.
    return torch.where(nonzero, (M / norms.unsqueeze(-1) / norms.unsqueeze(-2)).clamp(-1, 1), 0.0)
