"""MGDA, the multiple-gradient descent algorithm (Désidéri 2012; Sener & Koltun 2018).

The update is the shortest vector of the convex hull of the task gradients: the weights minimise wᵀMw over w >= 0 with
Σ w = 1. Then (Mw)_i >= wᵀMw for every task, so a step along the update lowers all losses, each to first order by at
least the square of the update's length. If the update is zero, no direction lowers all of them. An active-set method
finds the exact minimum. Frank-Wolfe, the usual choice, ends at vectors up to 285 times as long if gradients are nearly
antiparallel or of very different lengths.
"""

from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, check_gramian, in_dtype
from gradkern.aggregators.scales import checked_losses, divided, loss_divisors
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.min_norm import min_norm
from gradkern.arguments import choice
from gradkern.ops.cosines import cosines

_min_norm = carried(min_norm)

NORMALIZATIONS = (None, "l2", "loss", "loss+")


class MGDA(Aggregator):
    """MGDA of Désidéri 2012, as Sener & Koltun 2018 use it for multi-task learning.

    The weights are at least 0 and sum to 1. A gradient of zero is left out of the hull: it belongs to a task that is
    absent, that does not reach a group of parameters, or that is at its own minimum.

    Args:
        normalize: the weights are found for gradients divided by 1 (None), by their lengths ("l2"), by their losses
            ("loss"), or by both ("loss+"), so that no task wins because its gradient is short. As in Sener & Koltun's
            code, the weights then apply to the gradients as they are.
    """

    uses_memory = False

    def __init__(self, normalize: str | None = None) -> None:
        super().__init__()
        self.normalize = choice("normalize", normalize, NORMALIZATIONS)

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # it depends on the instance
        """Whether gradients are divided by their losses."""
        return self.normalize in ("loss", "loss+")

    def weights(self, M: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the weights of the hull's shortest vector; see :meth:`Aggregator.weights`.

        Args:
            M: (..., T, T), Gramians.
            losses: (..., T), for "loss" and "loss+", floating, on M's device. Those of gradients that are not zero must
                be above 0; where the host may not look, on a device, any other one gives weights that are not a number.

        Raises:
            TypeError: ``losses`` is not a floating tensor.
            ValueError: it is missing, is on another device, its last dimension is not T, or a loss on a CPU is not
                above 0.
        """
        return self._hull_weights(M, None, losses)

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the weights of the present tasks' hull; see :meth:`Aggregator.solution`."""
        return Solution(self._hull_weights(M, present, losses))

    def _hull_weights(self, M: Tensor, present: Tensor | None, losses: Tensor | None) -> Tensor:
        check_gramian(M)
        hull = M if self.normalize is None else M.detach().double()
        if self.normalize in ("l2", "loss+"):
            hull = cosines(hull)
        if self.needs_losses:
            of_losses = checked_losses(losses, M, f"normalize={self.normalize!r}", batched=True)
            hull = divided(hull, loss_divisors(of_losses, hull, present))
        return in_dtype(_min_norm(hull, present), M)

    def __repr__(self) -> str:
        return f"MGDA(normalize={self.normalize!r})"
