"""Task gradients that are hard for a method: T vectors in float64, by name."""

from collections.abc import Callable

import torch
from torch import Tensor


def conflicting(T: int, P: int) -> Tensor:
    """Return random gradients around a common direction that points both ways: about half of the pairs conflict."""
    return torch.randn(T, P, dtype=torch.float64) + torch.randn(T, 1, dtype=torch.float64)


def ill_conditioned(T: int, P: int) -> Tensor:
    """Return rows whose lengths span six orders of magnitude, nearly parallel or antiparallel in pairs."""
    J = conflicting(T, P)
    for i in range(1, T, 2):
        J[i] = -J[i - 1] + 1e-3 * J[i]
    return J * torch.logspace(-3, 3, T, dtype=torch.float64).unsqueeze(-1)


def duplicate(T: int, P: int) -> Tensor:
    """Return rows of which every second one repeats the row before it."""
    J = conflicting(T, P)
    J[1::2] = J[: T - 1 : 2]
    return J


def antiparallel(T: int, P: int) -> Tensor:
    """Return rows of which every second one is the opposite of the row before it."""
    J = conflicting(T, P)
    J[1::2] = -J[: T - 1 : 2]
    return J


def with_zeros(T: int, P: int) -> Tensor:
    """Return rows of which every third one is zero."""
    J = conflicting(T, P)
    J[::3] = 0
    return J


PROBLEMS: dict[str, Callable[[int, int], Tensor]] = {
    "conflicting": conflicting,
    "ill-conditioned": ill_conditioned,
    "duplicate": duplicate,
    "antiparallel": antiparallel,
    "zero": with_zeros,
    "tiny": lambda T, P: 1e-15 * conflicting(T, P),
    "huge": lambda T, P: 1e15 * conflicting(T, P),
}
