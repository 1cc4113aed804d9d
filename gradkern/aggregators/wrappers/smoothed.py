"""A method with weights that move slowly: CR-MOGM (Zhou et al. 2022, Algorithm 1).

Gradients of batches are noisy, and the weights that a method computes from them are correlated with the noise, so the
update is biased. A running mean of the weights moves less from batch to batch, λ_k = a λ_{k-1} + (1 - a) w_k, and the
update is λ_kᵀ J.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, all_finite, check_gramian
from gradkern.aggregators.task_state import TaskState
from gradkern.aggregators.wrappers.wrapper import Wrapper, nan_where
from gradkern.arguments import number


class Smoothed(Wrapper, TaskState):
    """Another method with a running mean of its weights, CR-MOGM of Zhou et al. 2022. Each group has its own mean.

    The means are state: each call is a step, and ``state_dict`` contains them. The first step of a task in a group
    starts its mean. A step in which a dot product or a weight is not finite changes no mean, because a gradient scaler
    will skip it. An absent task's mean waits, and the method within decides what weight its remembered gradient has.
    Groups may be added later.

    Args:
        aggregator: the method, any that looks at the Gramian alone.
        decay: a, the share of the mean that a step keeps, from 0 (no mean at all) to 1 (the first step's weights for
            ever).

    Attributes:
        mean: (S, T) float64, the means for each group and task, NaN before the task's first step; None before any.
    """

    kept = ("mean",)
    mean: Tensor | None

    def __init__(self, aggregator: Aggregator, decay: float = 0.9) -> None:
        super().__init__(aggregator)
        self.decay = number("decay", decay, least=0, most=1)

    def solution(
        self,
        M: Tensor,
        present: Tensor | None,
        losses: Tensor | None = None,
        eps: Sequence[float] | None = None,
    ) -> Solution:
        """Return the solution of the method within, with the means after this step as weights of present tasks.

        Args:
            M: (S, T, T), as for :meth:`weights`.
            present: as for :meth:`Aggregator.solution`.
            losses: as for :meth:`weights`.
            eps: the spacing of numbers at 1 in the arithmetic of each group's rows; None if it is that of M's dtype.
        """
        check_gramian(M)
        before = self._kept_for("mean", M, torch.nan)
        solution = self._inner(M, present, losses, eps)
        w = solution.weights.detach().double()
        moved = torch.where(before.isnan(), w, self.decay * before + (1 - self.decay) * w)
        finite = all_finite(M, present) & (w.isfinite() if present is None else w.isfinite() | ~present).all(-1)
        moves = finite.all() if present is None else finite.all() & present
        self._keep("mean", M, torch.where(moves, moved, before))
        result = moved if present is None else torch.where(present, moved, w)
        return replace(solution, weights=nan_where(~finite.unsqueeze(-1), result).to(M.dtype))

    def __repr__(self) -> str:
        return f"Smoothed({self.aggregator!r}, decay={self.decay})"
