"""GradVac (Wang et al. 2021, "Gradient Vaccine: Investigating and Improving Multi-task Optimization", Algorithm 1).

Every task has a target for every partner: a running mean of the cosine between the task's modified gradient and the
partner's original one. If the cosine is below the target, the task gets a multiple of the partner's gradient added, so
large that the cosine equals the target. PCGrad is the special case of targets that stay zero.
"""

from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Program, Solution, has_numbers
from gradkern.aggregators.projection import Order, Projection
from gradkern.arguments import number
from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.capture import capturing, first_use, keep


class GradVac(Projection):
    """GradVac of Wang et al. 2021. Each group has its own targets; one launch serves all groups.

    The targets are state: each call is a step, and ``state_dict`` contains them. An instance before its first step
    loads targets of any shape. A step in which a dot product is not finite changes no target, because a gradient scaler
    will skip it. Groups added later start from targets of zero.

    Args:
        beta: the share by which a step moves a target toward the cosine, φ̂ ← (1 - β) φ̂ + β φ; from 0, which keeps
            the targets constant, to 1.
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
        self.beta = number("beta", beta, least=0, most=1)
        self.register_buffer("targets", None)

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the present tasks' weights, and the targets after the step; only present tasks' targets move."""
        return self._reported(M, super().solution(M, present).weights)

    def program(self, M: Tensor) -> Program | None:
        """Return GradVac's program; see :meth:`Aggregator.program`."""
        if type(self) is not GradVac:  # a subclass may compute other weights
            return None
        S, T, _ = M.shape
        keys, targets = self._order_keys(S, T, M.device), self._targets_for(M)
        update_mask = torch.ones(T, dtype=torch.bool, device=M.device)  # the operator finds non-finite numbers
        projection = ProjectionArguments(keys, "all", targets, update_mask, self.beta, self.reduction == "mean")

        def solution(M: Tensor, w: Tensor) -> Solution:
            if has_numbers(M):
                self.targets = targets
            return self._reported(M, w)

        return Program(projection, solution)

    def _reported(self, M: Tensor, w: Tensor) -> Solution:
        """Return the weights, and the targets after the step."""
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
        """Return the current targets on M's device, followed by zeros for added groups."""
        S, T, _ = M.shape
        with torch.inference_mode(False):  # a later step outside of it must be able to change them
            if capturing(M.device) and (self.targets is None or len(self.targets) != S):
                raise first_use("to make the targets")  # each replay would reset them
            if self.targets is None or not has_numbers(M):
                return torch.zeros(M.shape, dtype=torch.float64, device=M.device)
            current = self.targets
            if current.shape[-1] != T or len(current) > S:
                raise ValueError(f"M is of {S} group(s) of {T} tasks, the targets are of shape {tuple(current.shape)}")
            if len(current) == S and current.device == M.device:
                if capturing(M.device):
                    keep(current)
                return current
            fresh = torch.zeros((S - len(current), T, T), dtype=torch.float64, device=M.device)
            return torch.cat((current.to(M.device), fresh))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the targets between devices, but keep them float64: a running mean with a small β needs the digits."""
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
