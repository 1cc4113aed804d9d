"""The shortest vector of a convex hull, exactly.

Minimise wᵀMw over w >= 0 with Σ w = 1, for many Gramians M at once. In the scale of the cosines K, with n_i = √M_ii,
v = n w and u = 1/n, it is to minimise vᵀKv over v >= 0 with uᵀv = 1. The multiplier of the equation only scales v, so
that the equation can wait: v minimises ½ vᵀKv - uᵀv over v >= 0, and is then divided by uᵀv.
"""

from gradkern.aggregators.solvers.active_set import complementary
from gradkern.aggregators.solvers.arrays import Array, space
from gradkern.aggregators.solvers.scaling import scaled


def min_norm(M: Array, among: Array | None = None) -> Array:
    """Return the weights w of the shortest vector of the convex hull.

    Args:
        M: (..., T, T), Gramians; leading dimensions are independent problems. That of the rows plus one vector,
            :func:`shifted`, gives the minimiser of wᵀMw + 2 qᵀMw.
        among: (..., T) bool, the rows of each hull, at least one; None for all. The others get the weight 0.

    Returns:
        (..., T), w >= 0 with sum 1. A zero row is left out of its hull and gets the weight 0; if all are zero, they
        share the weight. A problem with an entry that is not finite gets NaN.
    """
    problem = scaled(M, among)
    u = space(M).amin(problem.n, -1)[..., None] / problem.n
    w = problem.weights(complementary(problem.K, u[..., None], problem.rows))
    return w / w.sum(-1)[..., None]


def shifted(M: Array, q: Array) -> Array:
    """Return the Gramian (..., T, T) of the rows g_i + Jᵀq, from that of the rows g_i of J, M, and q (..., T)."""
    Mq = (M @ q[..., None])[..., 0]
    return M + Mq[..., None] + Mq[..., None, :] + (q * Mq).sum(-1)[..., None, None]


def shortfall(M: Array, w: Array) -> Array:
    """Return by how much w misses (Mw)_i >= wᵀMw (...): the largest difference, relative to the terms of a product.

    Rows are divided by their lengths, and zero rows do not count.
    """
    xp = space(M)
    K, n, rows, _ = scaled(M)
    v = xp.where(rows, w * n, 0.0)
    slope = (K @ v[..., None])[..., 0]
    short = ((v * slope).sum(-1)[..., None] / n - slope) / v.sum(-1)[..., None]
    return xp.amax(xp.where(rows, short, 0.0), -1)
