"""DB-MTL, dual balancing (Lin et al. 2023, "Dual-Balancing for Multi-Task Learning").

Losses are balanced by their logarithms, whose gradients g_i / L_i do not depend on the units of the losses. Running
means of them, ĝ_i ← β ĝ_i + (1 - β) g_i / L_i, are then balanced by their lengths: the update is Σ α ĝ_i / ‖ĝ_i‖ with
α = max_j ‖ĝ_j‖.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Solution, check_gramian
from gradkern.aggregators.history.averaged import Averaged
from gradkern.aggregators.scales import check_positive
from gradkern.arguments import number


class DBMTL(Averaged):
    """DB-MTL of Lin et al. 2023: running means of the gradients of log losses, all made as long as the longest.

    The means start from 0, as in the official code, so first updates are shorter: the first is 1 - beta times as long
    as those of equal gradients in every step. A mean of zero has the weight 0. On a matrix, the rows are the gradients
    of the logarithms of the losses. A loss that is not greater than 0 is an error on a CPU; on a device it gives
    weights that are not a number, and moves no mean. Unlike in the official code, unshared parameters get the gradients
    of the losses themselves. With a gradient scaler call ``update(scaler=)``, in which methods see the losses without
    the scale. After ``backward`` of scaled losses the update would be too small by the scale.

    The T means take as much memory as the T task gradients, of the shared parameters' dtype; see :class:`Averaged`.

    Args:
        beta: the share of a mean that a step keeps, from 0 (no means) and below 1.
    """

    needs_losses = True

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = number("beta", beta, least=0, below=1)

    def rates(self, steps: Tensor) -> Tensor:
        """Return 1 - beta; see :meth:`Averaged.rates`."""
        return torch.full_like(steps, 1 - self.beta)

    def scales(self, losses: Tensor) -> Tensor:
        """Return 1 / L_i, NaN where a loss is no finite number greater than 0; see :meth:`Averaged.scales`.

        Raises:
            ValueError: a loss on a CPU is not greater than 0.
        """
        check_positive(losses, "DB-MTL takes their logarithms")
        return torch.where((losses > 0) & losses.isfinite(), 1 / losses.double(), torch.nan)

    def weights(self, M: Tensor) -> Tensor:
        """Return max_j n_j / n_i from the Gramian of the means; see :meth:`Aggregator.weights`."""
        return self.solution(M, None).weights

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the weights of the present tasks; see :meth:`Aggregator.solution`."""
        check_gramian(M)
        n = M.detach().double().diagonal(dim1=-2, dim2=-1).sqrt()
        if present is not None:
            n = torch.where(present, n, 0.0)
        w = torch.where(n == 0, 0.0, n.amax(-1, keepdim=True) / n)
        spoilt = ~n.isfinite().all(-1, keepdim=True)
        return Solution(torch.where(spoilt, torch.nan, w).to(M.dtype))

    def __repr__(self) -> str:
        return f"DBMTL(beta={self.beta})"
