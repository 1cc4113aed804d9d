"""DualProj (Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization"; Lopez-Paz & Ranzato 2017, GEM).

The update is the mean of the task gradients, projected onto their dual cone: the nearest vector that raises no task's
loss, to first order. Gradients without conflict keep their mean.
"""

from torch import Tensor

from gradkern.aggregators.gramian.dual_cone import DualConeMethod, begun
from gradkern.aggregators.solvers.active_set import nonnegative
from gradkern.aggregators.solvers.arrays import Array, carried


class DualProj(DualConeMethod):
    """DualProj of Quinton & Rey 2024: the mean of the task gradients, projected onto their dual cone.

    A gradient of zero counts in the mean.

    TorchJD gives the weights of the mean if the squares of the gradients' lengths sum to less than 1e-4. Here only
    gradients that are all zero have them, so that short gradients are treated as long ones are.

    Args:
        preference: T finite numbers, not all 0, the weights of the combination that is projected; None for 1/T, T the
            number of present tasks. A task of preference 0 has no part in the combination, and one below 0 its
            opposite. The update raises the loss of neither.
    """

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _dual_proj(M, present, self._preference_of(M))


@carried
def _dual_proj(M: Array, among: Array | None, preference: Array | None) -> Array:
    G, u = begun(M, among, preference)
    return u + nonnegative(G, (G @ u[..., None])[..., 0])
