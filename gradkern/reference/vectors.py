"""Dot products and combinations of task gradients, as explicit vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gramian(grads: Sequence[Tensor]) -> Tensor:
    """Return all dot products of T vectors: (T, T) float64."""
    rows = [g.double() for g in grads]
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])


def combine(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_i g_i: (P,) float64. A gradient of weight 0 is left out."""
    total = torch.zeros_like(grads[0], dtype=torch.float64)
    for g, w in zip(grads, weights, strict=True):
        if w != 0:
            total = total + w * g.double()
    return total


def project(grads: Sequence[Tensor], W: Sequence[Sequence[float]]) -> Tensor:
    """Return the rows Σ_i W_ri g_i, one for each r: (R, P) float64."""
    zero = torch.zeros_like(grads[0], dtype=torch.float64)
    return torch.stack([sum((w * g.double() for g, w in zip(grads, row, strict=True)), zero) for row in W])


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors; 0 where either is zero."""
    n_a, n_b = length(a), length(b)
    return 0.0 if n_a == 0 or n_b == 0 else float(torch.dot(a.double() / n_a, b.double() / n_b))


def length(g: Tensor) -> float:
    """Return the length of a vector."""
    return float(g.double().norm())
