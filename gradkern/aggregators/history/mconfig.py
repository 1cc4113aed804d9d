"""M-ConFIG, ConFIG on momenta (Liu et al. 2024, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
Networks", Algorithm 1).

Each task has a momentum, m_i ← β m_i + (1 - β) g_i, and m̂_i = m_i / (1 - β^t_i) after t_i steps of the task. The
update is ConFIG's for the m̂_i: the direction of equal cosines with all of them, as long as the sum of their projections
on it. A task that is absent takes part with its momentum, so each step needs the backward pass of one task only.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Solution, check_gramian
from gradkern.aggregators.gramian.config import conflict_free
from gradkern.aggregators.history.averaged import Averaged
from gradkern.arguments import number


class MConFIG(Averaged):
    """M-ConFIG of Liu et al. 2024: the conflict-free direction of the tasks' momenta.

    An absent task takes part with its momentum from its first step on, in the parameters that the present tasks reach.
    So tasks may take turns: name the shared parameters by ``shared=`` then, since no step shows that two losses reach
    them.

    The official operator also divides the update by the root of a second moment, as Adam does; here that is left to the
    optimizer. The update is a momentum already: use SGD without momentum, or Adam with ``betas=(0, 0.999)``. The
    official operator makes no update before every task has had a step.

    The T momenta take as much memory as the T task gradients, of the shared parameters' dtype; see :class:`Averaged`.

    Args:
        beta: β, the share of a momentum that a step keeps, from 0 (plain ConFIG) and below 1.
    """

    recalls_absent = True

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = number("beta", beta, least=0, below=1)

    def rates(self, steps: Tensor) -> Tensor:
        """Return 1 - beta; see :meth:`Averaged.rates`."""
        return torch.full_like(steps, 1 - self.beta)

    def weights(self, M: Tensor) -> Tensor:
        """Return ConFIG's weights from the Gramian of the momenta; see :meth:`Aggregator.weights`."""
        return self.solution(M, None).weights

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the weights of all tasks that have a momentum; see :meth:`Aggregator.solution`."""
        check_gramian(M)
        if self.steps is None or len(self.steps) != M.shape[-1]:
            return Solution(conflict_free(M, None, torch.finfo(M.dtype).eps, 1.0).to(M.dtype))
        steps = self.steps.to(M.device)
        debias = torch.where(steps > 0, 1 / (1 - self.beta**steps), 1.0)
        debiased = M.detach().double() * debias.unsqueeze(-1) * debias
        return Solution((conflict_free(debiased, None, torch.finfo(M.dtype).eps, 1.0) * debias).to(M.dtype))

    def __repr__(self) -> str:
        return f"MConFIG(beta={self.beta})"
