"""The cases of the self-check for the solvers of T x T problems."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradkern import reference
from gradkern.check.problems import products
from gradkern.ops import operators
from gradkern.ops.registry import Comparison


@operators.active_set.check
def _active_set(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare CAGrad's update, whose problem has two right sides, and MGDA's, whose problem has one."""
    for J, K, n in _cosines(dtype):
        T, square = len(J), (0.4 * J.mean(0).norm()) ** 2
        slope = (K @ n) / T
        R = torch.stack((1 / n, -slope), -1)
        first = torch.arange(T) == (slope * n).argmin()
        y = operators.active_set(K.to(device), R.to(device), first.to(device), square.to(device)).cpu() / n
        yield (1 / T + y) @ J, reference.cagrad(list(J), 0.4, rescale=False), (1 / T + y) @ J.abs()
        v = operators.active_set(K.to(device), R[:, :1].to(device), torch.ones(T, device=device) > 0, None).cpu() / n
        yield v @ J / v.sum(), reference.mgda(list(J)), v @ J.abs() / v.sum()


@operators.fair.check
def _fair(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare both sides of the equations, K v and a v^(-γ)."""
    for _, K, n in _cosines(dtype):
        for gamma in (0.5, 1.0, 2.0):
            v = operators.fair(K.to(device), n.to(device), gamma).cpu()
            yield K @ v, n * v**-gamma, K.abs() @ v + n * v**-gamma


@operators.jacobi.check
def _jacobi(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for J, _, _ in _cosines(dtype):
        M, size = products([J])[0][0], products([J])[1][0]
        values, vectors = (x.cpu() for x in operators.jacobi(M.to(device)))
        yield vectors * values @ vectors.mT, M, size
        yield vectors.mT @ vectors, torch.eye(len(J), dtype=torch.float64), torch.ones(len(J), len(J))


def _cosines(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows far from dependent, their cosines and their lengths; nothing but in float64.

    They are few, because the reference tries every set of rows.
    """
    for T in (1, 3, 6) if dtype == torch.float64 else ():
        J = torch.randn(T, 40 * T, dtype=dtype)
        n = J.norm(dim=1)
        yield J, J @ J.T / n / n[:, None], n
