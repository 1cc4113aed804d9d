"""UPGrad, DualProj, PCD and CAGrad, by trying every set of tasks."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, gramian, length


def upgrad(grads: Sequence[Tensor], preference: Sequence[float] | None = None) -> Tensor:
    """Return the sum of each gradient, times its preference, projected onto the dual cone (Quinton & Rey 2024).

    Args:
        grads: T vectors of P numbers; time grows as 2^T.
        preference: T numbers; None for 1/T.
    """
    u = _preferred(len(grads), preference)
    return torch.stack([_projected(grads, [u[i] * (i == j) for j in range(len(u))]) for i in range(len(u))]).sum(0)


def dualproj(grads: Sequence[Tensor], preference: Sequence[float] | None = None) -> Tensor:
    """Return the mean of the gradients, projected onto their dual cone (Quinton & Rey 2024).

    Args:
        grads: T vectors of P numbers; time grows as 2^T.
        preference: T numbers, the weights in place of the mean's; None for 1/T.
    """
    return _projected(grads, _preferred(len(grads), preference))


def cagrad(grads: Sequence[Tensor], c: float = 0.5, rescale: bool = True) -> Tensor:
    """Return the vector in a ball around the mean with the largest least dot product (Liu et al. 2021).

    For each set of gradients, of all vectors in the ball with equal dot products with them, one has the largest. So has
    one that is orthogonal to all of them, if 0 is in their hull. The answer is the best of these vectors.

    Args:
        grads: T vectors of P numbers; time grows as 2^T.
        c: the ball's radius, relative to the length of the mean.
        rescale: whether to divide by 1 + c².
    """
    mean = torch.stack([g.double() for g in grads]).mean(0)
    rows = [g.double() for g in grads if length(g) != 0]
    radius = c * length(mean)
    best, update = -math.inf, mean
    for chosen in _sets(rows):
        for step in _equal_steps(chosen, mean, radius):
            worst = min(float(torch.dot(g, mean + step)) for g in rows)
            if length(step) <= radius * (1 + 1e-9) and worst > best:
                best, update = worst, mean + step
    return update / (1 + c * c) if rescale else update


def _equal_steps(chosen: Sequence[Tensor], mean: Tensor, radius: float) -> Iterator[Tensor]:
    """Yield the shortest s with g_iᵀ(mean + s) = t for all gradients chosen: of t = 0, and of the length ``radius``."""
    lengths = torch.stack([g.norm() for g in chosen])
    units = torch.stack(list(chosen)) / lengths.unsqueeze(1)
    inverse = torch.linalg.pinv(units, rtol=1e-11)
    across, along = inverse @ (units @ mean), inverse @ (1 / lengths)
    yield -across
    # If gradients chosen are opposite, only t = 0 is possible.
    if length(units @ along * lengths - 1) > 1e-6:
        return
    # ‖t along - across‖ = radius
    A, B, C = (float(torch.dot(x, y)) for x, y in ((along, along), (along, across), (across, across)))
    yield (B + math.sqrt(max(B * B - A * (C - radius * radius), 0.0))) / A * along - across


def pcd_updates(steps: Sequence[Sequence[Tensor]], tau: float = 0.02, beta: float = 0.999) -> list[Tensor]:
    """Return the updates of consecutive steps of priority-constrained descent, in which all tasks are present.

    Args:
        steps: the task gradients of each step, the primary one first; time grows as 2^T.
        tau: the share of its own progress that each other task gets at least.
        beta: the share of a running mean that a step keeps.
    """
    sums, updates = [0.0] * len(steps[0]), []
    for k, grads in enumerate(steps, 1):
        sums = [beta * s + (1 - beta) * length(g) ** 2 for s, g in zip(sums, grads, strict=True)]
        means = [s / (1 - beta**k) for s in sums]
        scaled = [
            g.double() / math.sqrt(mean) if mean > 0 else g.double() for g, mean in zip(grads, means, strict=True)
        ]
        d = _constrained(scaled, tau)
        n = length(d)
        updates.append(d * (length(grads[0]) / n) if n > 0 else d)
    return updates


def _constrained(rows: Sequence[Tensor], tau: float) -> Tensor:
    """Return the nearest vector to the first row whose product with each other row is at least τ times its square."""
    primary, *others = rows
    others = [g for g in others if length(g) != 0]
    nearest, best = math.inf, primary
    for chosen in [[], *_sets(others)]:
        d = primary
        if chosen:
            J = torch.stack(chosen)
            short = tau * J.square().sum(1) - J @ primary
            d = primary + J.T @ torch.linalg.lstsq(J @ J.T, short.unsqueeze(1)).solution.squeeze(1)
        met = all(float(torch.dot(g, d)) >= tau * length(g) ** 2 - 1e-10 * length(g) * length(d) for g in others)
        if met and length(d - primary) < nearest:
            nearest, best = length(d - primary), d
    return best


def _projected(grads: Sequence[Tensor], u: Sequence[float]) -> Tensor:
    """Return Jᵀv for the v that minimises vᵀGv over v >= u, with G = M / tr M + 1e-4 I: the best of all sets at u."""
    M = gramian(grads)
    G = M / (M.trace() if M.trace() > 0 else 1.0) + 1e-4 * torch.eye(len(M), dtype=M.dtype)
    low = torch.tensor(u, dtype=torch.float64)
    least, best = math.inf, low
    for size in range(len(u) + 1):
        for chosen in combinations(range(len(u)), size):
            free = torch.tensor([i in chosen for i in range(len(u))])
            v = low.clone()
            if size:
                v[free] = torch.linalg.solve(G[free][:, free], -G[free][:, ~free] @ low[~free])
            value = float(v @ G @ v)
            if (v >= low - 1e-12).all() and value < least:
                least, best = value, v
    return combine(grads, best.tolist())


def _preferred(T: int, preference: Sequence[float] | None) -> list[float]:
    return [1 / T] * T if preference is None else list(preference)


def _sets(rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield every set of rows that is not empty."""
    for size in range(1, len(rows) + 1):
        yield from map(list, combinations(rows, size))
