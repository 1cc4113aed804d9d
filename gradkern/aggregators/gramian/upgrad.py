"""UPGrad (Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization").

Each gradient, times its weight in the mean, is projected onto the dual cone of all gradients, and the update is the sum
of the projections. None of them raises a loss, to first order, so that the update raises none. A task contributes as
much as does not hurt any other. Gradients without conflict stay as they are, and the update is their mean.
"""

from torch import Tensor

from gradkern.aggregators.gramian.dual_cone import DualConeMethod, begun
from gradkern.aggregators.solvers.active_set import nonnegative
from gradkern.aggregators.solvers.arrays import Array, carried


class UPGrad(DualConeMethod):
    """UPGrad of Quinton & Rey 2024: the sum of each task's gradient, projected onto the dual cone of all.

    The T problems of a Gramian are solved at once, exactly. A gradient of zero counts in the mean.

    TorchJD gives the weights of the mean if the squares of the gradients' lengths sum to less than 1e-4. Here only
    gradients that are all zero have them, so that short gradients are treated as long ones are.

    Args:
        preference: T finite numbers, not all 0, by which the gradients are multiplied before they are projected; None
            for 1/T, T the number of present tasks. A task of preference 0 adds nothing of its own, and the update still
            does not raise its loss. One below 0 projects the opposite of its gradient, the part of which that raises
            the task's own loss is then taken away.
    """

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _upgrad(M, present, self._preference_of(M))


@carried
def _upgrad(M: Array, among: Array | None, preference: Array | None) -> Array:
    G, u = begun(M, among, preference)
    # Problem i has p = G e_i u_i, which is row i of G times u_i.
    return u + nonnegative(G[..., None, :, :], G * u[..., None]).sum(-2)
