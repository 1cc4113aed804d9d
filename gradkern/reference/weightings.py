"""Weightings of losses, step by step on explicit numbers; the derivatives come from autograd."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradkern.reference.vectors import combine, length

Steps = Sequence[Sequence[Tensor]]
"""The T task gradients of each step."""
Losses = Sequence[Sequence[float]]
"""The T losses of each step."""


def _derivatives(objective: Callable[[Tensor], Tensor], losses: Sequence[float]) -> list[float]:
    """Return the derivatives of an objective by the losses."""
    x = torch.tensor(losses, dtype=torch.float64, device="cpu", requires_grad=True)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(objective(x), x)
    return grad.tolist()


def _softmax(scores: Sequence[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def uncertainty(grads: Sequence[Tensor], T: int, losses: Sequence[float]) -> Tensor:
    """Return the update of Uncertainty (Kendall et al. 2018) while all log-variances are 0."""
    return combine(grads, _derivatives(lambda x: (x * 0.5).sum(), losses))


def imtl_loss(grads: Sequence[Tensor], T: int, losses: Sequence[float]) -> Tensor:
    """Return the update of IMTL-L (Liu et al. 2021) while all log-scales are 0."""
    return combine(grads, _derivatives(lambda x: x.sum(), losses))


def geometric_mean(grads: Sequence[Tensor], losses: Sequence[float]) -> Tensor:
    """Return the gradient of the losses' geometric mean (Chennupati et al. 2019)."""
    return combine(grads, _derivatives(lambda x: x.prod() ** (1 / len(x)), losses))


def dwa(steps: Steps, losses: Losses, temperature: float = 2, every: int = 1) -> list[Tensor]:
    """Return the updates of dynamic weight average (Liu et al. 2019); a loss is a mean over ``every`` steps."""
    updates: list[Tensor] = []
    means: list[list[float]] = []
    for t, grads in enumerate(steps):
        w = [1.0] * len(grads)
        if len(means) >= 2:
            shares = _softmax([a / b / temperature for a, b in zip(means[-1], means[-2], strict=True)])
            w = [len(grads) * share for share in shares]
        updates.append(combine(grads, w))
        if (t + 1) % every == 0:
            means.append([sum(of_task) / every for of_task in zip(*losses[t + 1 - every : t + 1], strict=True)])
    return updates


def stch(steps: Steps, losses: Losses, mu: float = 1, warmup: int = 100) -> list[Tensor]:
    """Return the updates of smooth Tchebycheff scalarization (Lin et al. 2024)."""
    updates = []
    for t, (grads, now) in enumerate(zip(steps, losses, strict=True)):
        objective: Callable[[Tensor], Tensor] = lambda x: x.log().sum()  # noqa: E731
        if t >= warmup:
            nadir = torch.tensor(losses[:warmup], dtype=torch.float64, device="cpu").mean(0)

            def objective(x: Tensor, nadir: Tensor = nadir) -> Tensor:
                return len(x) * mu * torch.logsumexp((x / nadir).log() / mu, 0)

        updates.append(combine(grads, _derivatives(objective, now)))
    return updates


def famo_weights(logits: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return FAMO's weights of losses (Liu et al. 2023): the derivatives of Σ z log L, scaled to the sum 1."""
    z = torch.tensor(_softmax(logits), dtype=torch.float64, device="cpu")
    w = _derivatives(lambda x: (z * (x + 1e-8).log()).sum(), losses)
    return [x / sum(w) for x in w]


def famo(steps: Steps, T: int, losses: Losses, lr: float = 0.025, decay: float = 1e-3) -> list[Tensor]:
    """Return the updates of FAMO (Liu et al. 2023) while its logits are 0, which ``after`` moves."""
    return [combine(grads, famo_weights([0.0] * T, now)) for grads, now in zip(steps, losses, strict=True)]


def gradnorm(steps: Steps, T: int, losses: Losses, alpha: float = 1.5, lr: float = 0.025) -> list[Tensor]:
    """Return the updates of GradNorm (Chen et al. 2018)."""
    w, updates = torch.ones(T, dtype=torch.float64, device="cpu"), list[Tensor]()
    for grads, now in zip(steps, losses, strict=True):
        updates.append(combine(grads, w.tolist()))
        n = torch.tensor([length(g) for g in grads], dtype=torch.float64, device="cpu")
        ratios = [x / first for x, first in zip(now, losses[0], strict=True)]
        r = torch.tensor([x * T / sum(ratios) for x in ratios], dtype=torch.float64, device="cpu")
        target = (w * n).mean() * r**alpha
        x = w.clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad((x * n - target).abs().sum(), x)
        w = (w - lr * grad).clamp(min=1e-3)
        w = w * T / w.sum()
    return updates
