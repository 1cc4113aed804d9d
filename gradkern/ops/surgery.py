"""The whole surgery of a matrix in one call, in plain PyTorch.

Little lies between the two passes over J: they leave the caches cold, and whatever comes after takes twice its time.
"""

import torch
from torch import Tensor

from gradkern.ops.blocks import widened
from gradkern.ops.methods import pcgrad_coefficients
from gradkern.ops.products import matrix_gramian
from gradkern.ops.pytorch import combine_matrix
from gradkern.ops.registration import operator


@operator("pcgrad.matrix")
def pcgrad_matrix(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """PCGrad's update, (P,)."""
    X = widened(J)
    M = matrix_gramian(X)
    (C,) = pcgrad_coefficients(M.unsqueeze(0), keys, partner)
    w = torch.from_numpy(C.mean(0) if mean else C.sum(0))
    return combine_matrix(X, w.to(J.device, M.dtype)).to(J.dtype)
