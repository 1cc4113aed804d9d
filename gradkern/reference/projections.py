"""PCGrad (Yu et al. 2020, Algorithm 1), its relatives that choose one partner, and GradVac (Wang et al. 2021)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import cosine, gramian, length


def pcgrad(grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the T gradients as PCGrad modifies them (Yu et al. 2020, Algorithm 1). The update is their sum.

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


def pcgrad_onto(grads: Sequence[Tensor], partners: Sequence[int | None]) -> list[Tensor]:
    """Project each gradient onto one partner if they conflict (Rhapsody on a Theme of Gradient Surgery, §3.3).

    A task whose partner is None keeps its gradient.
    """
    return pcgrad(grads, [[] if j is None else [j] for j in partners])


def most_similar(grads: Sequence[Tensor]) -> list[int | None]:
    """Return for each task its partner of largest cosine (Rhapsody, eq. 7); the first of equals, None of none."""
    return [max(partners(grads, i), key=lambda j: cosine(grads[i], grads[j]), default=None) for i in range(len(grads))]


def most_different(grads: Sequence[Tensor]) -> list[int | None]:
    """Return for each task its partner of smallest cosine (Rhapsody, eq. 8); the first of equals, None of none."""
    return [min(partners(grads, i), key=lambda j: cosine(grads[i], grads[j]), default=None) for i in range(len(grads))]


def partners(grads: Sequence[Tensor], i: int) -> list[int]:
    """Return the tasks that may be partners of task i: all others, except those whose gradient is zero."""
    return [j for j, g in enumerate(grads) if j != i and length(g) != 0]


def pcgrad_average(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean over all partners of the projections, each from the original gradient (Rhapsody, eq. 6)."""
    modified = []
    for i, g in enumerate(grads):
        projected = [pcgrad([g, grads[j]], [[1], []])[0] for j in partners(grads, i)]
        modified.append(torch.stack(projected).mean(0) if projected else g.double())
    return modified


def pcgrad_of(partner: str, grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run PCGrad with any partner. ``order`` is as for :func:`pcgrad`; "random" takes the first partner in it."""
    if partner == "average":
        return pcgrad_average(grads)
    if partner == "all":
        return pcgrad(grads, order)
    if partner == "random":
        first = [next((j for j in row if j in partners(grads, i)), None) for i, row in enumerate(order)]
        return pcgrad_onto(grads, first)
    return pcgrad_onto(grads, {"most_similar": most_similar, "most_different": most_different}[partner](grads))


def pcgrad_update(
    grads: Sequence[Tensor], order: Sequence[Sequence[int]] | None = None, partner: str = "all"
) -> Tensor:
    """Return the sum of PCGrad's modified gradients.

    ``order`` is as for :func:`pcgrad_of`. It may be None for partners that need no order.
    """
    return torch.stack(pcgrad_of(partner, grads, order or [[] for _ in grads])).sum(0)


def gradvac(
    grads: Sequence[Tensor], order: Sequence[Sequence[int]], targets: Tensor, beta: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """Return GradVac's modified gradients and its moved targets (Wang et al. 2021, Algorithm 1).

    Args:
        grads: T vectors of P numbers.
        order: as for :func:`pcgrad`.
        targets: (T, T), φ̂_ij.
        beta: how far a target moves toward the cosine.
        eps: a squared length of at most ``eps`` times the sum of its terms counts as zero, and the cosine aimed at
            stays at least ``eps`` away from -1 and √eps away from 1.
    """
    originals = [g.double() for g in grads]
    J = torch.stack(originals)
    M = gramian(originals)
    moved = targets.double().clone()
    modified = []
    for i in range(len(grads)):
        c = torch.zeros(len(grads), dtype=torch.float64, device="cpu")
        c[i] = 1
        for j in order[i]:
            if j == i:
                continue
            g, g_j = c @ J, originals[j]
            terms = torch.outer(c, c).mul(M).abs().sum()
            n, n_j = length(g), length(g_j)
            if n * n <= eps * terms or n_j == 0 or not math.isfinite(n * n_j):
                continue
            phi = max(-1.0, min(1.0, float(torch.dot(g / n, g_j / n_j))))
            target = max(-1 + eps, min(1 - math.sqrt(eps), float(moved[i, j])))
            if phi < target:
                a = n * (target * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - target**2))
                c[j] += a / (n_j * math.sqrt(1 - target**2))
            moved[i, j] = (1 - beta) * moved[i, j] + beta * phi
        modified.append(c @ J)
    if not M.isfinite().all():
        moved = targets.double().clone()
    return modified, moved


def gradvac_updates(
    steps: Sequence[Sequence[Tensor]], order: Sequence[Sequence[int]], beta: float = 0.01
) -> list[Tensor]:
    """Return the updates of GradVac in several steps. Targets start from zero; ``order`` is as for :func:`pcgrad`."""
    targets = torch.zeros(len(steps[0]), len(steps[0]), dtype=torch.float64, device="cpu")
    updates = []
    for grads in steps:
        modified, targets = gradvac(grads, order, targets, beta, torch.finfo(torch.float64).eps)
        updates.append(torch.stack(modified).sum(0))
    return updates
