"""GradVac (Wang et al. 2021, "Gradient Vaccine: Investigating and Improving Multi-task Optimization", Algorithm 1).

Every pair of tasks has a target, a running mean of the cosine between the one's modified and the other's original
gradient. A task whose cosine with a partner falls short of the target gets as much of the partner's gradient added as
brings it there; PCGrad is the case of targets that stay zero.
"""

from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Program, Solution, has_numbers
from gradkern.aggregators.projection import Order, Projection
from gradkern.ops import operators
from gradkern.ops.arguments import Projection as Arguments
from gradkern.ops.capture import capturing, first_use, keep


class GradVac(Projection):
    """GradVac of Wang et al. 2021, with targets of its own for each group, all groups in one launch.

    The targets are state: one call is one step, they are part of ``state_dict``, and an instance that has made no step
    yet takes them in whatever shape they come. A step with any dot product that is not finite leaves all of them alone,
    for a gradient scaler will skip it. Groups added later start from targets of zero.

    Args:
        beta: how far a target moves toward the cosine in a step, φ̂ ← (1 - β) φ̂ + β φ; from 0, with which targets
            stay where they are, to 1.
        order: as for :class:`PCGrad`.
        reduction: as for :class:`PCGrad`.
        generator: as for :class:`PCGrad`.

    Attributes:
        targets: (S, T, T) float64, φ̂ for each group, task and partner; None before the first step.
    """

    targets: Tensor | None

    def __init__(
        self,
        beta: float = 0.01,
        order: Order | None = None,
        reduction: str = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(order, reduction, generator)
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:  # NaN is not
            raise ValueError(f"beta must be a number from 0 to 1, got {beta!r}")
        self.beta = float(beta)
        self.register_buffer("targets", None)

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the present tasks' weights, and the targets after the step; only present tasks' targets move."""
        return self._reported(M, super().solution(M, present).weights)

    def program(self, M: Tensor) -> Program | None:
        """Return GradVac's program; see :meth:`Aggregator.program`."""
        if type(self) is not GradVac:  # which may have weights of its own
            return None
        S, T, _ = M.shape
        keys, targets = self._order_keys(S, T, M.device), self._targets_for(M)
        update_mask = torch.ones(T, dtype=torch.bool, device=M.device)  # the operator finds what is not finite
        projection = Arguments(keys, "all", targets, update_mask, self.beta, self.reduction == "mean")

        def solution(M: Tensor, w: Tensor) -> Solution:
            if has_numbers(M):
                self.targets = targets
            return self._reported(M, w)

        return Program(projection, solution)

    def _reported(self, M: Tensor, w: Tensor) -> Solution:
        """Return weights, and the targets after the step."""
        if self.targets is None or not has_numbers(M):
            return Solution(w)
        return Solution(w, targets=self.targets.clone().view(M.shape))

    def _solve(self, M: Tensor, present: Tensor | None) -> Tensor:
        keys, targets = self._order_keys(len(M), M.shape[-1], M.device), self._targets_for(M)
        update_mask = M.isfinite().all().expand(M.shape[-1])
        if present is not None:
            update_mask = update_mask & present
        C = operators.gradvac(M, keys, targets, update_mask, self.beta)
        if has_numbers(M):
            self.targets = targets
        return C

    def _targets_for(self, M: Tensor) -> Tensor:
        """Return the present targets, with fresh ones behind them for added groups, on M's device."""
        S, T, _ = M.shape
        with torch.inference_mode(False):  # or no later step outside of it could move them
            if capturing(M.device) and (self.targets is None or len(self.targets) != S):
                raise first_use("to make the targets")  # a replay would make them again
            if self.targets is None or not has_numbers(M):
                return torch.zeros(M.shape, dtype=torch.float64, device=M.device)
            known = self.targets
            if known.shape[-1] != T or len(known) > S:
                raise ValueError(f"M is of {S} group(s) of {T} tasks, the targets are of shape {tuple(known.shape)}")
            if len(known) == S and known.device == M.device:
                if capturing(M.device):
                    keep(known)
                return known
            fresh = torch.zeros((S - len(known), T, T), dtype=torch.float64, device=M.device)
            return torch.cat((known.to(M.device), fresh))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move between devices, but keep the dtype: a running mean with so small a share needs its digits."""
        targets, self.targets = self.targets, None
        super()._apply(fn, recurse)
        if targets is not None:
            self.targets = targets.to(fn(targets).device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}targets")
        if loaded is not None:
            if not isinstance(loaded, Tensor) or loaded.ndim != 3 or loaded.shape[1] != loaded.shape[2]:
                raise ValueError(f"targets in state_dict must be of shape (S, T, T), got {loaded!r}")
            if self.targets is None or self.targets.shape != loaded.shape:
                device = loaded.device if self.targets is None else self.targets.device
                self.targets = torch.zeros(loaded.shape, dtype=torch.float64, device=device)
        elif f"{prefix}_extra_state" in state_dict:
            self.targets = None  # saved before its first step
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta}, {self._repr_shared()})"
