"""The solvers of T x T problems on the Triton back end: one launch for all problems, a program for each.

Problems with more tasks than a program holds go to the PyTorch back end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.kernels import active_set as active_set_kernel
from gradkern.kernels import fair as fair_kernel
from gradkern.kernels import jacobi as jacobi_kernel
from gradkern.kernels.settings import SOLVER_T
from gradkern.ops import operators
from gradkern.ops.limits import ACTIVE_SET, FAIR, PATIENCE, sweeps
from gradkern.ops.registry import DEFAULT
from gradkern.ops.triton.backend import implements

NOISE = 2.0**-52
"""The size of an entry off the diagonal that counts as 0 to Jacobi's method, relative to the two on it."""


@implements(operators.active_set)
def active_set(K: Tensor, R: Tensor, free: Tensor, square: Tensor | None = None) -> Tensor:
    """Solve convex problems with bounds."""
    *batch, T, columns = R.shape
    if T > SOLVER_T:
        return operators.active_set.implementation(DEFAULT)(K, R, free, square)
    v = R.new_empty((*batch, T))
    active_set_kernel.active_set(
        _listed(K, batch, T, T),
        _listed(R, batch, T, columns),
        _listed(free, batch, T),
        None if square is None else _listed(square, batch),
        v.view(math.prod(batch), T),
        {**ACTIVE_SET._asdict(), "rounds": PATIENCE * ACTIVE_SET.rounds(T)},
    ).run(R.device)
    return v


@implements(operators.fair)
def fair(K: Tensor, a: Tensor, gamma: float) -> Tensor:
    """Compute v > 0 with K v = a v^(-gamma)."""
    *batch, T, _ = K.shape
    if T > SOLVER_T:
        return operators.fair.implementation(DEFAULT)(K, a, gamma)
    v = K.new_empty((*batch, T))
    limits = {**FAIR._asdict(), "rounds": PATIENCE * FAIR.rounds}
    fair_kernel.fair(_listed(K, batch, T, T), _listed(a, batch, T), gamma, v.view(math.prod(batch), T), limits).run(
        K.device
    )
    return v


@implements(operators.jacobi)
def jacobi(M: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors."""
    T = M.shape[-1]
    if T > SOLVER_T:
        return operators.jacobi.implementation(DEFAULT)(M)
    n = math.prod(M.shape[:-2])
    A = M.clone(memory_format=torch.contiguous_format)
    V = torch.eye(T, dtype=M.dtype, device=M.device).repeat(*M.shape[:-2], 1, 1)
    jacobi_kernel.jacobi(A.view(n, T, T), V.view(n, T, T), sweeps(T), NOISE).run(M.device)
    return A.diagonal(0, -2, -1).contiguous(), V


def _listed(x: Tensor, batch: Sequence[int], *shape: int) -> Tensor:
    """Return the arrays of a shape, one for each problem of the batch, one after another in memory."""
    return x.expand((*batch, *shape)).reshape(math.prod(batch), *shape).contiguous()
