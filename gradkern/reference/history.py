"""Methods on running means of the task gradients: MoCo, DB-MTL and M-ConFIG, with the vectors kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, gramian, length

Steps = Sequence[Sequence[Tensor]]
"""T vectors of P numbers for each step."""


def moco(
    steps: Steps,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
) -> list[Tensor]:
    """Return the updates of consecutive steps (Fernando et al. 2023, Algorithm 1); arguments are its step sizes."""
    T = len(steps[0])
    tracked = [torch.zeros_like(g, dtype=torch.float64) for g in steps[0]]
    w = [1 / T] * T
    updates = []
    for k, grads in enumerate(steps, 1):
        rate = beta / k**beta_sigma
        tracked = [y - rate * (y - g.double()) for y, g in zip(tracked, grads, strict=True)]
        M = gramian(tracked).tolist()
        rate = gamma / k**gamma_sigma
        slope = [sum(M[i][j] * w[j] for j in range(T)) + rho * w[i] for i in range(T)]
        w = _on_simplex([w[i] - rate * slope[i] for i in range(T)])
        updates.append(combine(tracked, w))
    return updates


def _on_simplex(v: Sequence[float]) -> list[float]:
    """Return the nearest point of the simplex: max(v - s, 0), with s such that the sum is 1, by bisection."""
    low, high = min(v) - 1, max(v)
    for _ in range(200):
        s = (low + high) / 2
        low, high = (s, high) if sum(max(x - s, 0.0) for x in v) > 1 else (low, s)
    return [max(x - low, 0.0) for x in v]


def dbmtl(steps: Steps, beta: float = 0.9, losses: Sequence[Sequence[float]] | None = None) -> list[Tensor]:
    """Return the updates of consecutive steps (Lin et al. 2023).

    Args:
        steps: the gradients of the losses, or of their logarithms if no losses are given.
        beta: the share of a mean that a step keeps.
        losses: T numbers for each step.
    """
    means = [torch.zeros_like(g, dtype=torch.float64) for g in steps[0]]
    updates = []
    for k, grads in enumerate(steps):
        divisors = [1.0] * len(grads) if losses is None else losses[k]
        means = [beta * m + (1 - beta) * g.double() / loss for m, g, loss in zip(means, grads, divisors, strict=True)]
        lengths = [length(m) for m in means]
        updates.append(combine(means, [max(lengths) / n if n != 0 else 0.0 for n in lengths]))
    return updates


def mconfig(steps: Steps, beta: float = 0.9) -> list[Tensor]:
    """Return the updates of consecutive steps (Liu et al. 2024), without a second moment.

    Args:
        steps: the gradients.
        beta: the share of a momentum that a step keeps.
    """
    momenta = [torch.zeros_like(g, dtype=torch.float64) for g in steps[0]]
    updates = []
    for k, grads in enumerate(steps, 1):
        momenta = [beta * m + (1 - beta) * g.double() for m, g in zip(momenta, grads, strict=True)]
        updates.append(config_direction([m / (1 - beta**k) for m in momenta]))
    return updates


def config_direction(grads: Sequence[Tensor]) -> Tensor:
    """Return the vector with equal cosines with all of T, as long as the sum of their projections on it."""
    rows = [g for g in grads if length(g) != 0]
    if not rows:
        return torch.zeros_like(grads[0])
    units = torch.stack([g / length(g) for g in rows])
    ones = torch.ones(len(units), 1, dtype=torch.float64, device=units.device)
    direction = torch.linalg.lstsq(units, ones, driver="gelsd").solution.flatten()
    direction = direction / length(direction)
    return direction * sum(float(g @ direction) for g in rows)


def modo(steps: Steps, seconds: Steps, gamma: float = 0.1, rho: float = 0.1) -> list[Tensor]:
    """Return the updates of consecutive steps (Chen et al. 2023); ``seconds`` are the second batches' gradients."""
    T = len(steps[0])
    w = [1 / T] * T
    updates = []
    for grads, others in zip(steps, seconds, strict=True):
        M = _products(grads, others)
        slope = [sum(M[i][j] * w[j] for j in range(T)) + rho * w[i] for i in range(T)]
        w = _on_simplex([w[i] - gamma * slope[i] for i in range(T)])
        updates.append(combine(grads, w))
    return updates


def sdmgrad(
    steps: Steps, seconds: Steps, lamb: float = 0.3, lr: float = 10.0, momentum: float = 0.5, n_iter: int = 20
) -> list[Tensor]:
    """Return the updates of consecutive steps (Xiao et al. 2023); ``seconds`` are the second batches' gradients."""
    T = len(steps[0])
    w = [1 / T] * T
    updates = []
    for grads, others in zip(steps, seconds, strict=True):
        M = _products(grads, others)
        s = sum(max(M[i][i], 0.0) ** 0.5 for i in range(T)) / T
        velocity = [0.0] * T
        for _ in range(n_iter if s > 0 else 0):
            slope = [sum(M[i][j] / s**2 * (w[j] + lamb / T) for j in range(T)) for i in range(T)]
            velocity = [momentum * v + x for v, x in zip(velocity, slope, strict=True)]
            w = _on_simplex([w[i] - lr * velocity[i] for i in range(T)])
        updates.append(combine(grads, [(x + lamb / T) / (1 + lamb) for x in w]))
    return updates


def _products(grads: Sequence[Tensor], others: Sequence[Tensor]) -> list[list[float]]:
    return [[float(g.double() @ h.double()) for h in others] for g in grads]
