"""Every method written naively, on explicit vectors, as its paper says: the specification that tests compare with.

Nothing here is fast, and nothing here is shared with what it checks. Arithmetic is float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gramian(grads: Sequence[Tensor]) -> Tensor:
    """All dot products of T vectors: (T, T) float64."""
    rows = [g.double() for g in grads]
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])


def combine(grads: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i g_i: (P,) float64. A gradient of weight 0 is left out."""
    total = torch.zeros_like(grads[0], dtype=torch.float64)
    for g, w in zip(grads, weights, strict=True):
        if w != 0:
            total = total + w * g.double()
    return total


def project(grads: Sequence[Tensor], W: Sequence[Sequence[float]]) -> Tensor:
    """Row r is Σ_i W_ri g_i: (R, P) float64."""
    zero = torch.zeros_like(grads[0], dtype=torch.float64)
    return torch.stack([sum((w * g.double() for g, w in zip(grads, row, strict=True)), zero) for row in W])


def pcgrad(grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> list[Tensor]:
    """PCGrad (Yu et al. 2020, Algorithm 1): the modified gradients of the T tasks; the update is their sum.

    Args:
        grads: T vectors of P numbers.
        order: for each task i, the tasks in the order in which it visits them; i itself is skipped.
    """
    originals = [g.double() for g in grads]
    modified = []
    for i, g in enumerate(originals):
        g_pc = g.clone()
        for j in order[i]:
            if j == i:
                continue
            dot = torch.dot(g_pc, originals[j])
            square = torch.dot(originals[j], originals[j])
            if dot < 0 and square > 0:
                g_pc = g_pc - dot / square * originals[j]
        modified.append(g_pc)
    return modified
