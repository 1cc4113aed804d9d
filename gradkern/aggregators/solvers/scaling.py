"""Gramians in the scale of their cosines, and what is left out of a problem."""

from math import isfinite
from typing import NamedTuple

from gradkern.aggregators.solvers.arrays import Array, every, identity, ones, space


class Scaled(NamedTuple):
    """Gramians of rows divided by their lengths, so that rows of very different lengths stay distinct.

    Attributes:
        K: (..., T, T), the cosines of the rows that take part; rows of the identity matrix for the others.
        n: (..., T), the lengths of the rows that take part; infinite for the others.
        rows: (..., T), the rows that take part: those given that are not zero. If all are zero, they take part as
            orthogonal rows of length 1. If an entry among those given is not finite, none takes part.
        failed: (..., 1), NaN if an entry among those given is not finite, else 0; or the number 0 for all problems.
    """

    K: Array
    n: Array
    rows: Array
    failed: Array | float

    def weights(self, v: Array) -> Array:
        """Return weights of the divided rows (..., T) as weights of the rows: 0 for those that take no part, or NaN."""
        return v / self.n if isinstance(self.failed, float) else v / self.n + self.failed


def scaled(M: Array, among: Array | None = None) -> Scaled:
    """Return Gramians M (..., T, T) in the scale of their cosines. ``among`` (..., T) gives the rows; None for all."""
    xp = space(M)
    n = xp.sqrt(M.diagonal(0, -2, -1))
    rows = n > 0
    if among is None and every(rows) and isfinite(M.sum()):  # as mostly: nothing is left out
        return Scaled(M / n[..., None] / n[..., None, :], n, rows, 0.0)
    given = xp.ones_like(rows) if among is None else xp.ones_like(rows) & among
    finite = (xp.isfinite(M) | ~(given[..., None] & given[..., None, :])).all(-1).all(-1)[..., None]
    rows = rows & given & finite
    both = rows[..., None] & rows[..., None, :]
    K = xp.where(both, M / n[..., None] / n[..., None, :], identity(M))
    zero = given & finite & ~rows.any(-1)[..., None]
    return Scaled(K, xp.where(rows, n, xp.where(zero, 1.0, xp.inf)), rows | zero, xp.where(finite, 0.0, xp.nan))


def mean_weights(x: Array, among: Array | None = None) -> Array:
    """Return the weights of the mean of T rows, of the kind of ``x`` (..., T).

    Those of all rows, (T,), or those of the rows that ``among`` (..., T) gives, and 0 for others, (..., T).
    """
    return ones(x) / x.shape[-1] if among is None else ones(x) * among / among.sum(-1)[..., None]
