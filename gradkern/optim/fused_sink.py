"""The sink of a fused step: from weights to the parameters, with no combined gradient in between.

The norm of the gradient, which clipping asks for, follows from the Gramian: ‖wᵀJ‖² = wᵀ M w, group by group. And a
gradient is finite if weights and dot products are, which gradient scalers ask for.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradkern.gradients.parameters import Targets
from gradkern.optim.adamw import AdamW, Combination
from gradkern.step.rows import Rows, kept_share
from gradkern.step.surgery import Outcome


class FusedAdamWSink:
    """Steps along the combination of the rows. It serves one update.

    Args:
        adamw: steps along the combination.
        step: calls ``adamw.step``, and hooks around it.
        scaler_proxy: stands before a scaler in place of the optimizer; the scaler recognizes it by its identity.
        max_norm: scale the gradient so that it is no longer than this.
        scaler: the losses are scaled by it.

    Attributes:
        total_norm: (), the norm of the gradient before it was cut; None without ``max_norm``.
    """

    needs_rows = True
    combines = False

    def __init__(
        self,
        adamw: AdamW,
        step: Callable[[], Any],
        scaler_proxy: SimpleNamespace,
        max_norm: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.adamw = adamw
        self.step = step
        self.scaler_proxy = scaler_proxy
        self.max_norm = max_norm
        self.scaler = scaler
        self.needs_unshared = max_norm is not None or scaler is not None
        self.total_norm: Tensor | None = None

    def check(self, rows: Rows) -> None:
        """Raise where the step would, before anything has changed."""
        self.adamw.check(rows.columns)

    def prepare(self, rows: Rows | None, outcome: Outcome, targets: Targets) -> None:
        """Note rows and weights: nothing is computed before the step."""
        assert rows is not None
        self._rows, self._outcome = rows, outcome

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Step along the combination; return the share of entries that the mask kept."""
        w, unshared = self._outcome.solution.weights, self._outcome.unshared_weights
        of_unshared = torch.ones_like(w[0]) if unshared is None else unshared
        columns = self._rows.columns
        along = Combination(columns, torch.cat((w, of_unshared.unsqueeze(0))), self._rows.mask, step_scale)
        if self.scaler is None:
            self._step(along)
        else:
            self._step_scaled(along, self.scaler)
        return None if along.kept is None else kept_share(along.kept, columns)

    def finish(self) -> None:
        """Do nothing: the optimizer has called its hooks, and there is no ``.grad``."""

    def _step(self, along: Combination) -> None:
        if self.max_norm is not None:
            self.total_norm = norm = self._norm(along.w)
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            # Not 0: a weight of 0 would read no row, and leave unseen what is not finite in it.
            along.w = along.w * torch.where(norm.isfinite(), factor, math.nan).to(along.w.dtype)
        self.adamw.combination = along
        try:
            self.step()
        finally:
            self.adamw.combination = None

    def _step_scaled(self, along: Combination, scaler: torch.amp.GradScaler) -> None:
        """Step through a scaler, which looks for numbers that are not finite in ``.grad``: here in the proxy's."""
        proxy = self.scaler_proxy

        def step() -> None:
            grad_scale: Tensor | None = getattr(proxy, "grad_scale", None)  # none if the scaler is switched off
            along.found_inf = getattr(proxy, "found_inf", None)
            if grad_scale is not None:
                along.w = along.w / grad_scale
            self._step(along)

        finite = self._products().isfinite().all() & along.w.isfinite().all()
        number = torch.zeros((), device=along.w.device)
        number.grad = torch.where(finite, number, math.inf)
        proxy.param_groups, proxy.step = [{"params": [number]}], step
        try:
            scaler.step(proxy)  # type: ignore[arg-type]
        finally:
            vars(proxy).clear()  # also of what a scaler leaves there where a step raises
            proxy._step_supports_amp_scaling = True

    def _norm(self, w: Tensor) -> Tensor:
        """Return (), ‖wᵀJ‖ over all parameters."""
        M = self._products()
        w64, M64 = w.double(), M.double()
        return torch.einsum("si,sij,sj->", w64, M64, w64).clamp(min=0).sqrt().to(M.dtype)

    def _products(self) -> Tensor:
        """Return (S + 1, T, T), the dot products of all groups, and of unshared parameters."""
        M, unshared = self._outcome.gramian, self._outcome.unshared_gramian
        assert M is not None, "a sink that needs rows has a Gramian"
        assert unshared is not None, "dot products over unshared parameters were not asked for"
        return torch.cat((M, unshared.unsqueeze(0)))
