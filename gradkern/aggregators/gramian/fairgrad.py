"""FairGrad (Ban & Ji 2024, "Fair Resource Allocation in Multi-Task Learning").

Tasks share the update as α-fairness shares a resource: the weights w > 0 are those with M w = w^(-1/α). A task that
gains little counts the more, the larger α is. α = 1 is proportional fairness, whose direction is Nash-MTL's, and α → ∞
the largest least gain. :mod:`gradkern.aggregators.solvers.fair` solves the equations by Newton's method.
"""

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.fair import fair
from gradkern.arguments import number

_fair = carried(fair)


class FairGrad(GramianMethod):
    """FairGrad of Ban & Ji 2024: the weights with M w = w^(-1/α), to 1e-9.

    The update does not grow with the gradients: with α = 1 it keeps its length, √T, and with larger α it shrinks. A
    gradient of zero is left out and gets the weight 0. If 0 is in the hull of the gradients, the equations have no
    solution. Then 1e-6 M_ii is added to each M_ii, which bounds the weights.

    The authors and TorchJD minimise the squares of the equations' errors by SciPy on the host.

    Args:
        alpha: α, above 0. From 0.5 to 4 the rounds on a device suffice for gradients whose lengths span six orders of
            magnitude.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha, above=0)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _fair(M, self.alpha, 1.0, present)

    def __repr__(self) -> str:
        return f"FairGrad(alpha={self.alpha})"
