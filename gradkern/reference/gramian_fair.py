"""Nash-MTL and FairGrad, by one equation after another."""

import math
from collections.abc import Sequence

from torch import Tensor

from gradkern.reference.vectors import combine, gramian, length

SWEEPS = 20000
"""More than well-conditioned gradients need."""


def fairgrad(grads: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """Return the update whose dot product with every gradient is its weight to the power -1/α (Ban & Ji 2024)."""
    return combine(grads, _fair(gramian(grads), 1 / alpha))


def nash_mtl(grads: Sequence[Tensor], max_norm: float | None = 1.0) -> Tensor:
    """Return Nash-MTL's update (Navon et al. 2022): (M / ‖M‖) w = 1/w, cut to the length ``max_norm``."""
    M = gramian(grads)
    size = length(M.flatten())
    update = combine(grads, _fair(M / (size or 1.0), 1.0))
    longest = math.inf if max_norm is None else max_norm
    return update * min(1.0, longest / (length(update) or 1.0))


def _fair(M: Tensor, gamma: float) -> list[float]:
    """Return w > 0 with M w = w^(-γ), and 0 for a row of zeros. The hull of the rows must not contain 0.

    The solution minimises a convex function. Each weight in turn takes the value that minimises it, until none moves.
    """
    rows = M.tolist()
    w = [1 / math.sqrt(rows[i][i]) if rows[i][i] > 0 else 0.0 for i in range(len(rows))]
    for _ in range(SWEEPS):
        before = list(w)
        for i, row in enumerate(rows):
            if row[i] > 0:
                others = sum(a * b for j, (a, b) in enumerate(zip(row, w, strict=True)) if j != i)
                w[i] = _root(row[i], others, gamma)
        if all(abs(a - b) <= 1e-15 * a for a, b in zip(w, before, strict=True)):
            break
    return w


def _root(a: float, b: float, gamma: float) -> float:
    """Return the x > 0 with a x + b = x^(-γ), by bisection of the logarithm."""
    low, high = -300.0, 300.0
    while high - low > 1e-16 * (abs(low) + abs(high)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        x = math.exp(middle)
        low, high = (low, middle) if a * x + b > x**-gamma else (middle, high)
    return math.exp(low)
