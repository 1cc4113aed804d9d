"""IMTL-G, impartial multi-task learning by gradients (Liu et al. 2021, "Towards Impartial Multi-Task Learning").

The update has equal projections on the unit vectors of all task gradients, and its weights sum to 1. With n_i = √M_ii
and the cosines K, such an update is Σ_i w_i g_i with n w = K⁺e, divided by the sum of w.

If 0 is an affine combination of the unit vectors, or nearly, no vector but 0 has equal projections, or the sum is
near 0. If the sum of w is at most √ε times the sum of |w|, where ε is the precision of the rows, it is mostly rounding.
Then the weights are 1/T each.
"""

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import Array, carried, every, ones, space
from gradkern.aggregators.solvers.eigen import pseudo_inverse
from gradkern.aggregators.solvers.scaling import scaled


class IMTLG(GramianMethod):
    """IMTL-G of Liu et al. 2021: the update has equal projections on the unit vectors of all task gradients.

    The weights sum to 1, and some may be negative. If the weights before that division sum to nearly 0, no such update
    exists, and every task's weight is 1/T. Fewer dimensions than tasks mean a solution by least squares over the
    numerical rank. A gradient of zero is left out and gets the weight 0.

    TorchJD's ``IMTLG`` inverts the Gramian, and not the cosines, so for dependent gradients of different lengths it may
    give other weights. It gives zeros where no solution exists.
    """

    needs_eps = True

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _impartial(M, present, eps)

    def __repr__(self) -> str:
        return "IMTLG()"


@carried
def _impartial(M: Array, among: Array | None, eps: Array | float) -> Array:
    xp = space(M)
    problem = scaled(M, among)
    members = ones(M) * problem.rows
    w = problem.weights(pseudo_inverse(problem.K, members, eps))
    total, size = w.sum(-1)[..., None], abs(w).sum(-1)[..., None]
    exists = abs(total) > eps**0.5 * size
    if every(exists):
        return w / total
    mean = members / members.sum(-1)[..., None].clip(1)
    return xp.where(exists, w / xp.where(exists, total, 1.0), mean) + problem.failed
