"""From the weights of a step to the step itself, with no combined gradient in between.

Its norm, which clipping and gradient scalers ask for, follows from what is known: ‖wᵀJ‖² = wᵀ M w, group by group.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradkern.optim.adamw import AdamW, Combination
from gradkern.rows import Column
from gradkern.solve import Outcome
from gradkern.suppression import Mask


class Stepping(Protocol):
    """An optimizer around an AdamW, and what a scaler takes for one, which it knows again by its identity."""

    optimizer: Any
    stand_in: Any

    def step(self) -> Any:
        """Step the AdamW."""


class OnePass:
    """One update of ``optimizer``.

    Args:
        optimizer: whose ``step`` steps an AdamW.
        max_norm: scale the gradient so that it is no longer than this.
        scaler: the losses are scaled by it.

    Attributes:
        total_norm: (), the norm of the gradient before it was cut; None without ``max_norm``.
    """

    def __init__(self, optimizer: Stepping, max_norm: float | None, scaler: torch.amp.GradScaler | None) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.scaler = scaler
        self.total_norm: Tensor | None = None

    def take(
        self, columns: Sequence[Column], outcome: Outcome, mask: Mask | None, step_scale: Tensor | None
    ) -> Tensor | None:
        """Step along the combination; the share of entries that the mask kept."""
        w = outcome.solution.weights
        plain = torch.ones_like(w[0]) if outcome.plain is None else outcome.plain
        along = Combination(columns, torch.cat((w, plain.unsqueeze(0))), mask, step_scale)
        if self.scaler is None:
            self._step(along, outcome)
        else:
            self._step_scaled(along, outcome, self.scaler)
        n_masked = sum(c.param.numel() for c in columns if c.unit >= 0)
        return along.kept / n_masked if along.kept is not None and n_masked else None

    def _step(self, along: Combination, outcome: Outcome) -> None:
        if self.max_norm is not None:
            self.total_norm = _norm(along, outcome)
            along.w = along.w * (self.max_norm / (self.total_norm + 1e-6)).clamp(max=1.0).to(along.w.dtype)
        inner: AdamW = self.optimizer.optimizer
        inner.combination = along
        try:
            self.optimizer.step()
        finally:
            inner.combination = None

    def _step_scaled(self, along: Combination, outcome: Outcome, scaler: torch.amp.GradScaler) -> None:
        """A scaler looks for what is not finite in ``.grad``: here in that of a stand-in, the sum of all squares."""

        def step() -> None:
            grad_scale: Tensor | None = getattr(stand_in, "grad_scale", None)  # none if the scaler is switched off
            along.found_inf = getattr(stand_in, "found_inf", None)
            if grad_scale is not None:
                along.w = along.w / grad_scale
            self._step(along, outcome)

        squares = _products(outcome).diagonal(dim1=-2, dim2=-1).sum().float()
        number = torch.zeros_like(squares)
        number.grad = squares
        stand_in = self.optimizer.stand_in
        stand_in.param_groups, stand_in.step = [{"params": [number]}], step
        try:
            scaler.step(stand_in)
        finally:
            del stand_in.param_groups, stand_in.step


def _norm(along: Combination, outcome: Outcome) -> Tensor:
    """(), ‖wᵀJ‖ over all parameters."""
    w, M = along.w.double(), _products(outcome).double()
    return torch.einsum("si,sij,sj->", w, M, w).clamp(min=0).sqrt().to(outcome.gramian.dtype)


def _products(outcome: Outcome) -> Tensor:
    """(S + 1, T, T), the dot products of all groups, and outside them."""
    if outcome.outside is None:
        raise AssertionError("dot products outside surgery were not asked for")
    return torch.cat((outcome.gramian, outcome.outside.unsqueeze(0)))
