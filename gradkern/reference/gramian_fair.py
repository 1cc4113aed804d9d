"""Nash-MTL and FairGrad, by minimising the convex function whose stationary point solves their equations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, gramian, length

ROUNDS = 500
"""More than Newton's method needs, also along a valley of nearly opposite gradients."""


def fairgrad(grads: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """Return the update whose dot product with every gradient is its weight to the power -1/α (Ban & Ji 2024)."""
    return combine(grads, _fair(grads, 1 / alpha, 1.0))


def nash_mtl(grads: Sequence[Tensor], max_norm: float | None = 1.0) -> Tensor:
    """Return Nash-MTL's update (Navon et al. 2022): (M / ‖M‖) w = 1/w, cut to the length ``max_norm``."""
    update = combine(grads, _fair(grads, 1.0, length(gramian(grads).flatten()) or 1.0))
    longest = math.inf if max_norm is None else max_norm
    return update * min(1.0, longest / (length(update) or 1.0))


def _fair(grads: Sequence[Tensor], gamma: float, size: float) -> list[float]:
    """Return w > 0 with (M / size) w = w^(-γ), and 0 for a row of zeros.

    If the hull of the rows contains 0, or comes so near that rounding decides, 1e-6 M_ii is added to each M_ii.
    """
    lengths = [length(g) for g in grads]
    some = [i for i, n in enumerate(lengths) if n > 0]
    w = [0.0] * len(grads)
    if not some:
        return w
    n = torch.tensor([lengths[i] for i in some], dtype=torch.float64)
    units = torch.stack([grads[i].double() / lengths[i] for i in some])
    a = size * n ** (gamma - 1)
    v = _stationary(units, a, gamma)
    if _distance(units, v) <= 1e-6:
        # A coordinate of its own, 1e-3 long, adds 1e-6 to the square of each row.
        v = _stationary(torch.cat((units, 1e-3 * torch.eye(len(some), dtype=torch.float64)), 1), a, gamma)
    for i, of_unit, of_length in zip(some, v.tolist(), n.tolist(), strict=True):
        w[i] = of_unit / of_length
    return w


def _stationary(units: Tensor, a: Tensor, gamma: float) -> Tensor:
    """Return v > 0 with K v = a v^(-γ), K = U Uᵀ, or a v that has grown very long if there is none.

    It minimises ½ ‖Uᵀv‖² - Σ a_i ∫ v_i^(-γ). A step of Newton's method is halved until v stays positive and the
    function does not grow.
    """

    def value(v: Tensor) -> float:
        integral = v.log() if gamma == 1 else v ** (1 - gamma) / (1 - gamma)
        return float((units.T @ v).square().sum() / 2 - (a * integral).sum())

    v = a ** (1 / (1 + gamma))
    for _ in range(ROUNDS):
        # (V K V + γ diag(goal)) x = goal - V K v for the step V x, as a least-squares problem, whose digits last longer
        rows, goal = v.unsqueeze(1) * units, a * v ** (1 - gamma)
        left = torch.cat((rows.T, (gamma * goal).sqrt().diag()))
        right = torch.cat((-rows.sum(0), (goal / gamma).sqrt()))
        step = v * torch.linalg.lstsq(left, right.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        share = 1.0
        while share > 1e-9 and ((v + share * step <= 0).any() or value(v + share * step) > value(v)):
            share /= 2
        moved = v + share * step
        if share <= 1e-9 or torch.equal(moved, v) or _distance(units, v) < 1e-7:
            break
        v = moved
    return v


def _distance(units: Tensor, v: Tensor) -> float:
    """Return the length of the combination of the rows with weights in the ratio of v and the sum 1."""
    return length(units.T @ v) / float(v.sum())
