"""From the weights of a step to the step itself, with no combined gradient in between.

Its norm, which clipping asks for, follows from what is known: ‖wᵀJ‖² = wᵀ M w, group by group. And a gradient is finite
if weights and dot products are, which gradient scalers ask for.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradkern.modifiers.suppression import Mask
from gradkern.optim.adamw import AdamW, Combination
from gradkern.step.rows import Column, share
from gradkern.step.surgery import Outcome


class OnePass:
    """One update.

    Args:
        adamw: which steps along the combination.
        step: calls ``adamw.step``, and hooks around it.
        stand_in: what a scaler takes for the optimizer, which it knows again by its identity.
        max_norm: scale the gradient so that it is no longer than this.
        scaler: the losses are scaled by it.

    Attributes:
        total_norm: (), the norm of the gradient before it was cut; None without ``max_norm``.
    """

    def __init__(
        self,
        adamw: AdamW,
        step: Callable[[], Any],
        stand_in: SimpleNamespace,
        max_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.adamw = adamw
        self.step = step
        self.stand_in = stand_in
        self.max_norm = max_norm
        self.scaler = scaler
        self.total_norm: Tensor | None = None

    def check(self, columns: Sequence[Column]) -> None:
        """Raise where the step would, before anything has changed."""
        self.adamw.check(columns)

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
        return None if along.kept is None else share(along.kept, columns)

    def _step(self, along: Combination, outcome: Outcome) -> None:
        if self.max_norm is not None:
            self.total_norm = norm = _norm(along.w, outcome)
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            # Not 0, by which no row would be read, and what is not finite in it not be seen.
            along.w = along.w * torch.where(norm.isfinite(), factor, math.nan).to(along.w.dtype)
        self.adamw.combination = along
        try:
            self.step()
        finally:
            self.adamw.combination = None

    def _step_scaled(self, along: Combination, outcome: Outcome, scaler: torch.amp.GradScaler) -> None:
        """A scaler looks for what is not finite in ``.grad``: here in that of a stand-in."""
        stand_in = self.stand_in

        def step() -> None:
            grad_scale: Tensor | None = getattr(stand_in, "grad_scale", None)  # none if the scaler is switched off
            along.found_inf = getattr(stand_in, "found_inf", None)
            if grad_scale is not None:
                along.w = along.w / grad_scale
            self._step(along, outcome)

        finite = _products(outcome).isfinite().all() & along.w.isfinite().all()
        number = torch.zeros((), device=along.w.device)
        number.grad = torch.where(finite, number, math.inf)
        stand_in.param_groups, stand_in.step = [{"params": [number]}], step
        try:
            scaler.step(stand_in)  # type: ignore[arg-type]
        finally:
            vars(stand_in).clear()  # also of what a scaler leaves there where a step raises
            stand_in._step_supports_amp_scaling = True


def _norm(w: Tensor, outcome: Outcome) -> Tensor:
    """(), ‖wᵀJ‖ over all parameters."""
    w, M = w.double(), _products(outcome).double()
    return torch.einsum("si,sij,sj->", w, M, w).clamp(min=0).sqrt().to(outcome.gramian.dtype)


def _products(outcome: Outcome) -> Tensor:
    """(S + 1, T, T), the dot products of all groups, and outside them."""
    assert outcome.outside is not None, "dot products outside surgery were not asked for"
    return torch.cat((outcome.gramian, outcome.outside.unsqueeze(0)))
