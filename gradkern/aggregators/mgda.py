"""MGDA, the multiple-gradient descent algorithm (Désidéri 2012; Sener & Koltun 2018).

The update is the shortest vector of the convex hull of the task gradients: the weights minimise wᵀMw over w >= 0 with
Σ w = 1. Then (Mw)_i >= wᵀMw for every task, so a step along the update lowers all losses, each to first order by at
least the square of the update's length. If the update is zero, no direction lowers all of them. An active-set method
finds the exact minimum. Frank-Wolfe, the usual choice, ends at vectors up to 285 times as long if gradients are nearly
antiparallel or of very different lengths.
"""

from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, check_gramian
from gradkern.aggregators.solvers.min_norm import min_norm
from gradkern.ops.cosines import cosines


class MGDA(Aggregator):
    """MGDA of Désidéri 2012, as Sener & Koltun 2018 use it for multi-task learning.

    The weights are at least 0 and sum to 1. A task whose gradient is zero is at its own minimum: it takes all the
    weight, and the update is zero. A task that is absent in a step is not part of the hull.

    Args:
        normalize: None, or "l2" to find the weights for gradients of length 1, so that no task wins because its
            gradient is short. As in Sener & Koltun's code, the weights are then applied to the original gradients.
    """

    leaves_out_absent = True

    def __init__(self, normalize: str | None = None) -> None:
        super().__init__()
        if normalize in ("loss", "loss+"):
            raise ValueError(f"normalize must be None or 'l2': a Gramian contains no losses; got {normalize!r}")
        if normalize not in (None, "l2"):
            raise ValueError(f"normalize must be None or 'l2', got {normalize!r}")
        self.normalize = normalize

    def weights(self, M: Tensor) -> Tensor:
        """Return the weights of the hull's shortest vector; see :meth:`Aggregator.weights`."""
        return self._solved(M, None)

    def solution(self, M: Tensor, present: Tensor | None) -> Solution:
        """Return the weights for the hull of the present tasks' gradients alone; see :meth:`Aggregator.solution`."""
        return Solution(self._solved(M, present))

    def _solved(self, M: Tensor, present: Tensor | None) -> Tensor:
        check_gramian(M)
        M = M.detach()
        hull = cosines(M.double()) if self.normalize == "l2" else M
        return min_norm(hull, present).to(M.dtype)

    def __repr__(self) -> str:
        return f"MGDA(normalize={self.normalize!r})"
