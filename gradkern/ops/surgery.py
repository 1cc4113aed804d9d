"""The whole surgery of a matrix in one call, in plain PyTorch.

Little lies between the two passes over J: they leave the caches cold, and whatever comes after takes twice its time.
"""

import numpy as np
import torch
from torch import Tensor

from gradkern.ops.blocks import widened
from gradkern.ops.methods import pcgrad_weights
from gradkern.ops.products import matrix_gramian
from gradkern.ops.pytorch import combine_matrix
from gradkern.ops.registration import operator

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


@operator("pcgrad.matrix")
def pcgrad_matrix(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """PCGrad's update, (P,)."""
    X = widened(J)
    M = matrix_gramian(X)
    weights = pcgrad_weights(M, keys, partner)
    if mean:
        weights = [w / len(weights) for w in weights]
    with np.errstate(over="ignore"):  # gradients that have overflowed are for the gradient scaler to find
        w = torch.from_numpy(np.array(weights, _NUMPY[M.dtype])).to(J.device)
    return combine_matrix(X, w).to(J.dtype)
