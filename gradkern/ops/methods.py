"""The methods' T x T programs in plain PyTorch: all segments and all tasks step through their partners together."""

import torch
from torch import Tensor

from gradkern.ops.registration import operator


@operator("pcgrad")
def pcgrad(M: Tensor, keys: Tensor, visits: int) -> Tensor:
    """PCGrad's coefficients (Yu et al. 2020, Algorithm 1), from the first ``visits`` partners of each task."""
    wide = M.double()
    C, D = _started(wide)
    norms = wide.diagonal(dim1=-2, dim2=-1)
    for j in _partners(M, keys)[:visits]:
        s = D.gather(-1, j)
        square = _of(norms, j)
        conflict = (s < 0) & (square > 0)
        step = torch.where(conflict, -s / square, 0.0)
        C.scatter_(-1, j, C.gather(-1, j) + step)
        D += torch.where(conflict, step * _row(wide, j), 0.0)
    return C.to(M.dtype)


@operator("gradvac")
def gradvac(M: Tensor, keys: Tensor, targets: Tensor, moving: Tensor, beta: float) -> Tensor:
    """GradVac's coefficients (Wang et al. 2021); ``targets`` (S, T, T) move in the rows that ``moving`` (T,) names."""
    eps = torch.finfo(M.dtype).eps
    wide = M.double()
    C, D = _started(wide)
    E = wide.abs()  # |C| |M|: what the rounding of C M Cᵀ is measured by
    norms = wide.diagonal(dim1=-2, dim2=-1).sqrt()
    for j in _partners(M, keys):
        # A sum of squares that comes out within the rounding of its terms is none.
        square = (C * D).sum(-1, keepdim=True)
        is_zero = ~(square > eps * (C.abs() * E).sum(-1, keepdim=True))
        n, n_j = square.sqrt(), _of(norms, j)
        there = ~is_zero & (n_j > 0)
        # φ = cos(g′_i, g_j)
        phi = (D.gather(-1, j) / n / n_j).clamp(-1, 1)
        target = targets.gather(-1, j)
        u = target.clamp(-(1 - eps), 1 - eps)
        # a = ‖g′_i‖ (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (‖g_j‖ √(1−φ̂²))
        root = (1 - u * u).sqrt()
        a = n * (u * (1 - phi * phi).sqrt() - phi * root) / (n_j * root)
        corrected = there & (phi < u)
        before = C.gather(-1, j)
        after = torch.where(corrected, before + a, before)
        C.scatter_(-1, j, after)
        partner = _row(wide, j)
        D += torch.where(corrected, a * partner, 0.0)
        E += torch.where(corrected, (after.abs() - before.abs()) * partner.abs(), 0.0)
        moved = torch.where(there & moving.unsqueeze(-1), (1 - beta) * target + beta * phi, target)
        targets.scatter_(-1, j, moved)
    return C.to(M.dtype)


def _started(M: Tensor) -> tuple[Tensor, Tensor]:
    """C, the modified gradients as combinations, and D = C M, their dot products with the original ones."""
    C = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M).clone()
    return C, M.clone()


def _partners(M: Tensor, keys: Tensor) -> list[Tensor]:
    """T - 1 times (S, T, 1), each task's next partner. Equal keys go by number: the sorts are stable."""
    T = M.shape[-1]
    order = torch.argsort(keys.expand_as(M), dim=-1, stable=True)
    own = torch.arange(T, device=M.device).unsqueeze(-1)
    # The own index goes last, everything else keeps its place.
    order = order.gather(-1, torch.argsort((order == own).to(torch.uint8), dim=-1, stable=True))
    return [order[..., k : k + 1] for k in range(T - 1)]


def _of(values: Tensor, j: Tensor) -> Tensor:
    """(S, T, 1): partner j's own of ``values`` (S, T)."""
    return values.gather(-1, j.squeeze(-1)).unsqueeze(-1)


def _row(M: Tensor, j: Tensor) -> Tensor:
    """(S, T, T): for each task the row of M of its partner j."""
    return M.gather(-2, j.expand_as(M))
