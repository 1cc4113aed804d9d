"""Methods that invert the matrix of the gradients, or of their unit vectors, on explicit vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, length

RANK = 1e-10
"""The least singular value that counts, relative to the largest."""


def imtl_g(grads: Sequence[Tensor]) -> Tensor:
    """Return the update with equal projections on all unit gradients, a combination with sum 1: IMTL-G (2021).

    The mean of the gradients if there is none.
    """
    unit = _units(grads)
    w = [0.0] * len(grads)
    direction = torch.linalg.pinv(torch.stack(list(unit.values())), rtol=RANK) @ torch.ones(len(unit)).double()
    solution = torch.linalg.lstsq(torch.stack(list(unit.values())).mT, direction, driver="gelsd").solution
    for i, v in zip(unit, solution.tolist(), strict=True):
        w[i] = v / (length(grads[i]) or 1.0)
    total = sum(w)
    if abs(total) <= 1e-8 * sum(abs(x) for x in w):
        return combine(grads, [1 / len(unit) if i in unit else 0.0 for i in range(len(grads))])
    return combine(grads, w) / total


def config(grads: Sequence[Tensor], preference: Sequence[float] | None = None) -> Tensor:
    """Return the update whose projections on the unit gradients are as ``preference``: ConFIG (Liu et al. 2024).

    Its length is the sum of the gradients' projections on it. Zero if no direction has such projections.
    """
    unit = _units(grads)
    p = [1.0] * len(grads) if preference is None else preference
    wanted = torch.tensor([p[i] for i in unit], dtype=torch.float64)
    direction = torch.linalg.pinv(torch.stack(list(unit.values())), rtol=RANK) @ wanted
    if length(direction) <= 1e-8:
        return torch.zeros_like(direction)
    direction = direction / length(direction)
    return sum(float(torch.dot(g.double(), direction)) for g in grads) * direction


def aligned_mtl(grads: Sequence[Tensor], scale: str = "min", preference: Sequence[float] | None = None) -> Tensor:
    """Return the sum of the gradients after their principal components are made equally long: Aligned-MTL (2023).

    Args:
        grads: T vectors.
        scale: the new length: that of the shortest component ("min"), of the "median" one, or the root of the mean
            square ("rmse").
        preference: T numbers that weigh the aligned gradients in the sum; None for ones.
    """
    J = torch.stack([g.double() for g in grads])
    U, lengths, V = torch.linalg.svd(J, full_matrices=False)
    lengths = lengths[lengths > RANK * lengths.max()]
    if len(lengths) == 0:
        return torch.zeros_like(J[0])
    new = {"min": lengths.min(), "median": lengths.median(), "rmse": lengths.square().mean().sqrt()}[scale]
    aligned = new * U[:, : len(lengths)] @ V[: len(lengths)]
    p = torch.ones(len(J)) if preference is None else torch.tensor(preference)
    return p.double() @ aligned


def _units(grads: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the gradients that are not zero, divided by their lengths, by task; all if all are zero."""
    unit = {i: g.double() / length(g) for i, g in enumerate(grads) if length(g) != 0}
    return unit or {i: g.double() for i, g in enumerate(grads)}
