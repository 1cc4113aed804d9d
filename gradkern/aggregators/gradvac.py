"""GradVac (Wang et al. 2021, "Gradient Vaccine: Investigating and Improving Multi-task Optimization", Algorithm 1).

Every task has a target for every partner: a running mean of the cosine between the task's modified gradient and the
partner's original one. If the cosine is below the target, the task gets a multiple of the partner's gradient added, so
large that the cosine equals the target. PCGrad is the special case of targets that stay zero.

The multiple is |g′|/|g_j| · sin(θ - θ̂) / sin θ̂, where φ = cos θ is the cosine and φ̂ = cos θ̂ its target. It grows
without bound as φ̂ nears 1: after dozens of steps with equal gradients, the first step with different ones would get
weights of 3·10⁷. The cosines behind φ̂ are known to ε, the spacing of numbers at 1 in the arithmetic of the group's
rows. An error of ε in φ̂ is one of ε / sin θ̂ in θ̂, and it changes the multiple by the share ε / sin² θ̂ ≈
ε / (2 - 2 φ̂). So a step aims at a cosine of 1 - √ε at most, where half of the multiple's digits are right. The
multiple is then at most 38 |g′|/|g_j| in float32, and 5800 |g′|/|g_j| in float64. Near -1 nothing grows, because there
sin(θ - θ̂) <= sin θ̂. The targets themselves go on to 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Program, Solution, check_gramian, has_numbers
from gradkern.aggregators.projection import Order, Projection
from gradkern.arguments import number, shown, tensor
from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.capture import capturing, first_use, keep
from gradkern.ops.dtypes import DTYPES


class GradVac(Projection):
    """GradVac of Wang et al. 2021. Each group has its own targets; one launch serves all groups.

    The targets are state: each call is a step, and ``state_dict`` contains them. An instance before its first step
    loads targets of any number of groups and tasks, and later of the same number of tasks. A step in which a dot
    product is not finite changes no target, because a gradient scaler will skip it. Groups added later start from
    targets of zero.

    Args:
        beta: the share by which a step moves a target toward the cosine, φ̂ ← (1 - β) φ̂ + β φ; from 0, which keeps
            the targets constant, to 1.
        order: as for :class:`PCGrad`.
        reduction: as for :class:`PCGrad`.
        generator: as for :class:`PCGrad`.

    Attributes:
        targets: (S, T, T) float64, φ̂ for each group, task and partner; None before the first step.
    """

    needs_eps = True
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

    def solution(
        self, M: Tensor, present: Tensor | None, losses: Tensor | None = None, eps: Sequence[float] | None = None
    ) -> Solution:
        """Return the present tasks' weights, and the targets after the step; only present tasks' targets move.

        Args:
            M: (S, T, T), as for :meth:`weights`.
            present: as for :meth:`Aggregator.solution`.
            losses: not needed.
            eps: the spacing of numbers at 1 in the arithmetic of each group's rows, S numbers; None if it is that of
                M's dtype.
        """
        check_gramian(M)
        return self._reported(M, self._reduced_over(present, self._solve(M.detach(), present, eps)))

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

    def _solve(self, M: Tensor, present: Tensor | None, eps: Sequence[float] | None = None) -> Tensor:
        keys, targets = self._order_keys(len(M), M.shape[-1], M.device), self._targets_for(M)
        update_mask = M.isfinite().all().expand(M.shape[-1])
        if present is not None:
            update_mask = update_mask & present
        C = operators.gradvac(M, keys, targets, update_mask, self.beta, eps)
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
                tasks, groups = f"{current.shape[-1]} tasks", f"{len(current)} group(s)"
                kept = "groups may be added, but not removed"
                if current.shape[-1] != T:
                    kept = "a task keeps its place among the losses, so pass None for one that is absent"
                raise ValueError(
                    f"GradVac's targets are of {tasks} in {groups}, and this step has {T} tasks in {S} group(s): "
                    f"{kept}. A new GradVac starts anew"
                )
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
            state_dict = {**state_dict, f"{prefix}targets": self._loadable(loaded)}
            if self.targets is None or self.targets.shape != loaded.shape:
                device = loaded.device if self.targets is None else self.targets.device
                self.targets = torch.zeros(loaded.shape, dtype=torch.float64, device=device)
        elif f"{prefix}_extra_state" in state_dict:
            self.targets = None  # saved before its first step
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loadable(self, loaded: object) -> Tensor:
        """Return targets from a ``state_dict`` in float64; raise unless they are cosines of this method's tasks."""
        name = "targets in state_dict"
        targets = tensor(name, loaded, DTYPES).double()
        if targets.ndim != 3 or targets.shape[1] != targets.shape[2]:
            raise ValueError(f"{name} must be of shape (S, T, T), got {tuple(targets.shape)}")
        own = self.order if self.targets is None else self.targets
        if own is not None and targets.shape[-1] != own.shape[-1]:
            raise ValueError(f"{name} must be of {own.shape[-1]} tasks as this method is, got {targets.shape[-1]}")
        # A mean of rounded cosines may be beyond 1 by a rounding.
        if has_numbers(targets) and not bool((targets.abs() <= 1 + torch.finfo(torch.float32).eps).all()):
            raise ValueError(f"{name} must be cosines, from -1 to 1; got {shown(targets.flatten().tolist())}")
        return targets

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta}, {self._repr_shared()})"
