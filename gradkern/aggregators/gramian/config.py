"""ConFIG, conflict-free inverse gradients (Liu et al. 2024, "ConFIG: Towards Conflict-free Training of PINNs").

The direction of the update has projections on the unit vectors of the task gradients that are as the preferences p:
equal ones by default. With the cosines K it is Σ_i c_i g_i / n_i, c = K⁺p, n_i = √M_ii. The length of the update is the
sum of the task gradients' projections on that direction, so that the update shrinks if the gradients disagree.
"""

from collections.abc import Sequence

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod, Preference
from gradkern.aggregators.solvers.arrays import Array, carried, ones, space
from gradkern.aggregators.solvers.eigen import pseudo_inverse
from gradkern.aggregators.solvers.scaling import scaled


class ConFIG(GramianMethod):
    """ConFIG of Liu et al. 2024: an update that conflicts with no task, as long as the gradients agree with it.

    If no direction has such projections because 0 is an affine combination of the gradients' unit vectors, the weights
    are 0. Fewer dimensions than tasks mean a direction by least squares over the numerical rank. A gradient of zero is
    left out and gets the weight 0. The update is TorchJD's and that of the authors' ``conflictfree``, which invert the
    matrix of unit vectors.

    Args:
        preference: the projections relative to each other, T finite numbers of at least 0, not all 0; None for equal
            ones. The update is orthogonal to the gradient of a task of preference 0. Below 0 there would be a conflict.
    """

    needs_eps = True

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self._preference = None if preference is None else Preference(preference, least=0)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return conflict_free(M, present, eps, 1.0 if self._preference is None else self._preference.of(M))

    def __repr__(self) -> str:
        return f"ConFIG(preference={None if self._preference is None else self._preference.values})"


@carried
def conflict_free(M: Array, among: Array | None, eps: Array | float, p: Array | float) -> Array:
    """Return ConFIG's weights (..., T).

    Args:
        M: (..., T, T), Gramians.
        among: (T,) bool, the tasks that take part; None for all. The others get the weight 0.
        eps: the relative precision of M's entries.
        p: the preferences, (T,) or one number for all tasks.
    """
    xp = space(M)
    K, n, rows, _ = problem = scaled(M, among)
    c = pseudo_inverse(K, p * rows * ones(M), eps)
    projections = (K @ c[..., None])[..., 0]
    square = (c * projections).sum(-1)[..., None]
    length = xp.where(rows, n * projections, 0.0).sum(-1)[..., None]
    exists = square > 0
    w = problem.weights(length * exists / (square + ~exists) * c)
    return w * (M.diagonal(0, -2, -1) > 0)  # 0 for a zero row, also if all are
