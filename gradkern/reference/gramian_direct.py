"""Methods that take their weights from lengths and distances of the gradients, or from no number of theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, length


def ntkmtl(grads: Sequence[Tensor], power: float = 0.5) -> Tensor:
    """Return the sum of the gradients weighted by (Σ_j ‖g_j‖² / ‖g_i‖²)^power: NTKMTL (Qin et al. 2025)."""
    squares = [length(g) ** 2 for g in grads]
    return combine(grads, [(sum(squares) / x) ** power if x > 0 else 0.0 for x in squares])


def krum(grads: Sequence[Tensor], n_byzantine: int, n_selected: int = 1) -> Tensor:
    """Return the mean of the ``n_selected`` gradients with the least scores: Multi-Krum (Blanchard et al. 2017).

    A score is the sum of the squared distances to the T - n_byzantine - 2 closest other gradients.
    """
    scores = []
    for i, a in enumerate(grads):
        squares = sorted(length(a.double() - b.double()) ** 2 for j, b in enumerate(grads) if j != i)
        scores.append(sum(squares[: len(grads) - n_byzantine - 2]))
    best = sorted(range(len(grads)), key=lambda i: scores[i])[:n_selected]
    return combine(grads, [1 / n_selected if i in best else 0.0 for i in range(len(grads))])


def rgw(grads: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Return the sum of the gradients with random weights, the softmax of normal draws: RGW (Lin et al. 2022)."""
    device = "cpu" if generator is None else generator.device
    draws = torch.randn(len(grads), generator=generator, dtype=torch.float64, device=device)
    sizes = draws.cpu().exp()
    return combine(grads, (sizes / sizes.sum()).tolist())
