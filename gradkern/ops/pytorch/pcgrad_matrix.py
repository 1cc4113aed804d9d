"""PCGrad's whole surgery of a matrix in one call, in PyTorch.

It does little between the two passes over J, because each pass leaves the caches cold and doubles the time of the work
after it.
"""

import numpy as np
import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.out import check_apart
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.combination import combine_matrix, widened
from gradkern.ops.pytorch.gramian import matrix_gramian
from gradkern.ops.pytorch.host_programs import pcgrad_weights


@implements(operators.pcgrad_matrix)
def pcgrad_matrix(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """Compute PCGrad's update, (P,)."""
    X = widened(J)
    return combine_matrix(X, _weights(X, order_keys, partner, mean)).to(J.dtype)


@implements(operators.pcgrad_matrix_out)
def pcgrad_matrix_out(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool, out: Tensor) -> None:
    """Compute PCGrad's update in ``out``."""
    check_apart(out, J)
    X = widened(J)
    combine_matrix(X, _weights(X, order_keys, partner, mean), out)


def _weights(X: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """Return the weights of the rows in the update, (T,)."""
    M = matrix_gramian(X)
    weights = pcgrad_weights(M, order_keys, partner, mean)
    return torch.from_numpy(np.array(weights)).to(X.device, M.dtype)  # not NumPy's conversion, which warns of overflow
