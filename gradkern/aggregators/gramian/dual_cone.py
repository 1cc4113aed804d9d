"""Projections of weighted gradients onto the dual cone, the directions in which no task's loss rises.

The nearest vector to Jᵀu with Jd >= 0 is d = Jᵀv for the v that minimises vᵀMv over v >= u (Quinton & Rey 2024,
"Jacobian Descent for Multi-Objective Optimization", Proposition 1). As in the authors' code, G = M / tr M + 1e-4 I
stands in for M, so that the solution is unique. Then v - u >= 0, Gv >= 0, and one of both is 0 for every task.
"""

from collections.abc import Sequence

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod, Preference
from gradkern.aggregators.solvers.arrays import Array, identity, space
from gradkern.aggregators.solvers.scaling import mean_weights

RIDGE = 1e-4
"""Relative to the sum of the squares of the rows' lengths."""


class DualConeMethod(GramianMethod):
    """A method that projects combinations of the task gradients onto their dual cone.

    Args:
        preference: T finite numbers, not all 0, the weights that the method begins with; None for the mean.
    """

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self._preference = None if preference is None else Preference(preference)

    def _preference_of(self, M: Tensor) -> Tensor | None:
        return None if self._preference is None else self._preference.of(M)

    def __repr__(self) -> str:
        preference = None if self._preference is None else self._preference.values
        return f"{type(self).__name__}(preference={preference})"


def begun(M: Array, among: Array | None, preference: Array | None) -> tuple[Array, Array]:
    """Return G (..., T, T) and the weights u (..., T) that a method begins with, 0 for tasks that are absent.

    G is not a number in a problem with an entry among the present tasks that is not finite.

    Args:
        M: (..., T, T), Gramians.
        among: (..., T) bool, the tasks that are present; None for all.
        preference: (T,), or None for the mean of the present tasks.
    """
    u = mean_weights(M, among) if preference is None else preference
    if among is not None:
        u, M = u * among, space(M).where(among[..., None] & among[..., None, :], M, 0.0)
    trace = M.diagonal(0, -2, -1).sum(-1)
    failed = 0.0 * M.sum((-2, -1))  # not a number if an entry is not finite, else 0
    return M / (trace + (trace == 0) + failed)[..., None, None] + identity(M, RIDGE), u
