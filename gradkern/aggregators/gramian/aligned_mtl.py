"""Aligned-MTL (Senushkin et al. 2023, "Independent Component Alignment for Multi-Task Learning").

The principal components of the task gradients get one length, √λ_R, and the update is the sum of the rows that result:
its weights are √λ_R M^(-1/2) p, with M's eigenvalues over its numerical rank. So no direction in which many gradients,
or long ones, agree drowns the others.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod, Preference
from gradkern.aggregators.solvers.arrays import Array, carried, positions, space
from gradkern.aggregators.solvers.eigen import eigh, numerical_rank, spread
from gradkern.arguments import choice


class AlignedMTL(GramianMethod):
    """Aligned-MTL of Senushkin et al. 2023: the principal components of the task gradients are made equally long.

    Components whose eigenvalue is at most ε T times the largest, where ε is the precision of the rows, are rounding and
    left out; so are gradients of zero. Beyond that, the smallest eigenvalue decides about the length of the update, so
    nearly dependent gradients make a short one.

    TorchJD's preference is 1/T for each task by default. Here it is 1, as in the authors' code.

    Args:
        scale: the eigenvalue whose root the length is: the smallest ("min"), the "median", the lower one of two, or the
            mean ("rmse").
        preference: T finite numbers, not all 0, by which the aligned gradients are weighted in the update; None for
            ones. At full rank the update's dot product with gradient i is √λ_R (M^(1/2) p)_i, so a task of preference 0
            has no say, and one below 0 works toward a higher loss, as a weight below 0 does in ``Sum``.
    """

    needs_eps = True

    def __init__(self, scale: str = "min", preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self.scale = choice("scale", scale, tuple(_SCALES))
        self._preference = None if preference is None else Preference(preference)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        p = None if self._preference is None else self._preference.of(M)
        return _aligned(M, present, eps, _SCALES[self.scale], p)

    def __repr__(self) -> str:
        preference = None if self._preference is None else self._preference.values
        return f"AlignedMTL(scale={self.scale!r}, preference={preference})"


def _smallest(values: Array, rank: Array) -> Array:
    xp = space(values)
    return xp.amin(xp.where(rank, values, xp.inf), -1)[..., None]


def _median(values: Array, rank: Array) -> Array:
    """Return the lower median. The values ascend, so that those of the rank are the last ones."""
    n = rank.sum(-1)[..., None]
    place = values.shape[-1] - n + (n - 1) // 2
    return space(values).where(positions(values) == place, values, 0.0).sum(-1)[..., None]


def _mean(values: Array, rank: Array) -> Array:
    return (values * rank).sum(-1)[..., None] / rank.sum(-1)[..., None].clip(1)


_SCALES: dict[str, Callable[[Array, Array], Array]] = {"min": _smallest, "median": _median, "rmse": _mean}
"""λ_R (..., 1) from the eigenvalues (..., T) in ascending order and the mask of the numerical rank."""


@carried
def _aligned(
    M: Array, among: Array | None, eps: Array | float, scale: Callable[[Array, Array], Array], p: Array | None
) -> Array:
    xp = space(M)
    if among is not None:
        M = xp.where(among[..., None] & among[..., None, :], M, 0.0)
    values, vectors = eigh(M)
    rank = numerical_rank(values, eps)
    factors = xp.where(rank, (scale(values, rank) / values) ** 0.5, 0.0 * values)  # which keeps NaN
    w = spread(factors, vectors, xp.ones_like(values) if p is None else p)
    return w if among is None else xp.where(among, w, 0.0)
