"""The same operations in the fewest PyTorch calls: the best without a library, also measured compiled."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gramian(J: Tensor) -> Tensor:
    """Return J Jᵀ."""
    return J @ J.T


def combine(J: Tensor, w: Tensor) -> Tensor:
    """Return wᵀ J."""
    return w @ J


def project(J: Tensor, W: Tensor) -> Tensor:
    """Return W J."""
    return W @ J


def pcgrad(J: Tensor) -> Tensor:
    """Return PCGrad's update, computed through the Gramian."""
    return coefficients(J @ J.T).sum(0) @ J


def coefficients(M: Tensor) -> Tensor:
    """Return PCGrad's coefficients for Gramians (..., T, T), all tasks together, without branching on device values.

    Every task also visits itself in its order, with a step of 0.
    """
    T = M.shape[-1]
    own = torch.arange(T, device=M.device).unsqueeze(-1)
    order = torch.rand(M.shape, device=M.device).argsort(-1)
    squares = M.diagonal(dim1=-2, dim2=-1).unsqueeze(-2).expand(M.shape)
    C = torch.eye(T, dtype=M.dtype, device=M.device).expand(M.shape)
    for k in range(T):
        j = order[..., k : k + 1]
        step = (C @ M).gather(-1, j).clamp(max=0) / squares.gather(-1, j)
        C = C.scatter_add(-1, j, torch.where(j == own, 0.0, -step))
    return C


def combined(grads: Sequence[Sequence[Tensor]], w: Tensor, p: float) -> list[Tensor]:
    """Compute the same as ``naive.combined``, for all tensors at once."""
    results = list(grads[0])
    if len(grads) > 1:
        results = torch._foreach_mul(results, w[0])
    for row, weight in zip(grads[1:], w[1:], strict=True):
        torch._foreach_add_(results, torch._foreach_mul(row, weight))
    return torch._foreach_mul(results, [torch.rand(g.shape, device=g.device) > p for g in results]) if p else results
