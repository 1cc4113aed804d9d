"""The surroundings of a method in a step: its scale, AdamW, and the memory of absent tasks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import cosine, length


def step_scale(grads: Sequence[Tensor], mode: str, reduce: str) -> float:
    """Return the factor κ that scales the step (Rhapsody, §3.4): 1 + φ to attenuate conflict, 1 - φ to amplify it."""
    nonzero = [g for g in grads if length(g) != 0]
    phis = [cosine(a, b) for i, a in enumerate(nonzero) for b in nonzero[i + 1 :]]
    if not phis or not all(math.isfinite(phi) for phi in phis):
        return 1.0
    phi = min(phis) if reduce == "min" else sum(phis) / len(phis)
    return 1 + phi if mode == "attenuate" else 1 - phi


def adamw(
    p: Tensor,
    moments: Sequence[Tensor],
    g: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> list[Tensor]:
    """Take a step of AdamW (Loshchilov & Hutter 2019, Algorithm 2) and return the new p, m and v.

    Args:
        moments: m and v. A third one, the largest v so far, turns on amsgrad (Reddi et al. 2018) and is returned too.
        step: the number of the step; the first is 1.
    """
    p, m, v, *largest = (x.double() for x in (p, *moments))
    m = betas[0] * m + (1 - betas[0]) * g.double()
    v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
    largest = [torch.maximum(u, v) for u in largest]
    m_hat = m / (1 - betas[0] ** step)
    v_hat = (largest[0] if largest else v) / (1 - betas[1] ** step)
    return [p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps), m, v, *largest]


class Memory:
    """Runs steps with some of the tasks, and keeps the last gradients of the others as vectors (Rhapsody, §3.2)."""

    def __init__(self, n_tasks: int, n_entries: int) -> None:
        self.rows = [torch.zeros(n_entries, dtype=torch.float64, device="cpu") for _ in range(n_tasks)]

    def step(self, present: dict[int, Tensor], method: Callable[[Sequence[Tensor]], list[Tensor]]) -> Tensor:
        """Return the sum of the present tasks' modified gradients. ``method`` modifies remembered gradients too."""
        for i, g in present.items():
            self.rows[i] = g.double()
        modified = method(self.rows)
        return torch.stack([modified[i] for i in present]).sum(0)
