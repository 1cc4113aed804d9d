"""PCGrad's whole surgery of a matrix in one call, in PyTorch.

It does little between the two passes over J, because each pass leaves the caches cold and doubles the time of the work
after it.
"""

import numpy as np
import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.combination import combine_matrix, widened
from gradkern.ops.pytorch.gramian import matrix_gramian
from gradkern.ops.pytorch.host_programs import pcgrad_weights


@implements(operators.pcgrad_matrix)
def pcgrad_matrix(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """Compute PCGrad's update, (P,)."""
    X = widened(J)
    M = matrix_gramian(X)
    weights = pcgrad_weights(M, order_keys, partner)
    if mean:
        weights = [w / len(weights) for w in weights]
    w = torch.from_numpy(np.array(weights)).to(J.device, M.dtype)  # not NumPy's conversion, which warns of overflow
    return combine_matrix(X, w).to(J.dtype)
