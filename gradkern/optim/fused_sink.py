"""The sink of a fused step, which applies weights to the parameters without a combined gradient in memory.

Clipping needs the norm of the gradient, which follows from the Gramian: ‖wᵀJ‖² = wᵀ M w, group by group. Gradient
scalers need to know whether the gradient is finite: it is if weights and dot products are.
"""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern.aggregators import Entrywise, GradAttention
from gradkern.distributed.comm import comm_of
from gradkern.gradients.parameters import Targets
from gradkern.optim.adamw import AdamW, Combination, along
from gradkern.step.flat_rows import FlatRows
from gradkern.step.masked import kept_share
from gradkern.step.options import Options
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome


def can_fuse(optimizer: Optimizer, options: Options, params: Sequence[Tensor], measured: bool) -> bool:
    """Return whether a step can combine the gradients itself; ``measured``: whether it needs their norm."""
    method, suppression = options.aggregator, options.suppression
    return (
        type(optimizer) is AdamW
        and comm_of(options.process_group) is None
        and not isinstance(method, Entrywise)
        and not method.is_trained
        and not (isinstance(method, GradAttention) and method.update == "subset")
        and not (measured and suppression is not None and suppression.scope == "update")
        and needs_no_grad(options, params)
    )


def needs_no_grad(options: Options, params: Sequence[Tensor]) -> bool:
    """Return whether a step can leave out ``.grad``: no torch backward pass writes it, and nobody else looks at it."""
    return (
        options.way.through == "rows"
        and not options.is_weighted_backward
        and not [p for p in params if p.grad is not None or getattr(p, "_post_accumulate_grad_hooks", None)]
    )


class FusedAdamWSink:
    """Steps along the combination of the rows. Each instance serves one update.

    Args:
        adamw: the optimizer.
        step: calls ``adamw.step``, and hooks around it.
        scaler_proxy: replaces the optimizer in calls of a scaler, which recognizes it by its identity.
        max_norm: the greatest norm of the gradient, to which longer ones are scaled down; None for no limit.
        scaler: the gradient scaler that scales the losses; None for none.

    Attributes:
        total_norm: (), the norm of the gradient before clipping; None without ``max_norm``.
    """

    needs_tensors = False
    takes_combination = False
    takes_rows = False

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
        self.total_norm: Tensor | None = None

    @property
    def needs_unshared(self) -> bool:
        """Whether the norm, or whether all numbers are finite, has to follow from dot products."""
        return self.max_norm is not None or self.scaler is not None

    @property
    def common(self) -> tuple[object, ...]:
        """Nothing: it takes the steps of one process."""
        return ()

    def check(self, rows: StepRows) -> None:
        """Raise if the step would, before anything has changed."""
        self.adamw.check(rows)

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Keep the rows and the weights; all computation happens in the step."""
        assert rows is not None
        self._rows, self._outcome = rows, outcome

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Step along the combination; return the share of entries that the mask kept."""
        direction = self._direction()
        direction.lr_scale = step_scale
        if self.scaler is None:
            self._step(direction)
        else:
            self._step_scaled(direction, self.scaler)
        return None if direction.kept is None else kept_share(direction.kept, self._rows.arrangement.columns)

    def finish(self) -> None:
        """Do nothing: there is no ``.grad`` for hooks."""

    def _direction(self) -> Combination:
        if isinstance(self._rows, FlatRows) and not self.needs_unshared:  # nothing scales the combination
            return along(self._rows, self._outcome.combine()[0])
        assert self._outcome.solution is not None, "it steps along weights"
        w, unshared = self._outcome.solution.weights, self._outcome.unshared_weights
        of_unshared = torch.ones_like(w[0]) if unshared is None else unshared
        return Combination(self._rows, torch.cat((w, of_unshared.unsqueeze(0))))

    def _step(self, direction: Combination) -> None:
        if self.max_norm is not None:
            self.total_norm = norm = self._norm(direction)
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            # NaN and not 0: with a weight of 0 the step would skip rows that are not finite.
            direction.w = direction.w * torch.where(norm.isfinite(), factor, math.nan).to(direction.w.dtype)
        self.adamw.combination = direction
        try:
            self.step()
        finally:
            self.adamw.combination = None

    def _step_scaled(self, direction: Combination, scaler: torch.amp.GradScaler) -> None:
        """Step through a scaler, which looks for non-finite numbers in ``.grad``; the proxy provides one."""
        proxy = self.scaler_proxy

        def step() -> None:
            grad_scale: Tensor | None = getattr(proxy, "grad_scale", None)  # unset if the scaler is disabled
            direction.found_inf = getattr(proxy, "found_inf", None)
            if grad_scale is not None:
                direction.w = direction.w / grad_scale
            self._step(direction)

        number = torch.zeros((), device=direction.w.device)
        number.grad = torch.where(self._is_finite(direction), number, math.inf)
        proxy.param_groups, proxy.step = [{"params": [number]}], step
        try:
            scaler.step(proxy)  # type: ignore[arg-type]
        finally:
            vars(proxy).clear()  # including attributes that a scaler leaves if a step raises
            proxy._step_supports_amp_scaling = True

    def _is_finite(self, direction: Combination) -> Tensor:
        """Return whether all numbers of the direction are finite, ()."""
        return self._products().isfinite().all() & direction.w.isfinite().all()

    def _norm(self, direction: Combination) -> Tensor:
        """Return ‖wᵀJ‖ over all parameters, ()."""
        M = self._products()
        w64, M64 = direction.w.double(), M.double()
        return torch.einsum("si,sij,sj->", w64, M64, w64).clamp(min=0).sqrt().to(M.dtype)

    def _products(self) -> Tensor:
        """Return the dot products (S + 1, T, T) of all groups, and of unshared parameters."""
        M, unshared = self._outcome.gramian, self._outcome.unshared_gramian
        assert M is not None, "a sink that needs rows has a Gramian"
        assert unshared is not None, "dot products over unshared parameters were not requested"
        return torch.cat((M, unshared.unsqueeze(0)))
