"""The vector in a ball around a combination of rows whose least dot product with a row is the largest.

Given g₀ = Jᵀp, maximise min_i g_iᵀd over d with ‖d - g₀‖ <= c‖g₀‖. The best vector is d = g₀ + Jᵀy with y >= 0, and

    s = M(p + y) - μ >= 0,  y_i = 0 or s_i = 0 for every i,  and yᵀMy = c²‖g₀‖².

Liu et al. 2021, "Conflict-Averse Gradient Descent", find y = c‖g₀‖ w / ‖Jᵀw‖ from w, which minimises
wᵀMp + c‖g₀‖ √(wᵀMw) over the simplex. Here y comes from the conditions themselves: on a set of free tasks it is an
affine function of μ, and the last equation is quadratic in μ.
"""

from gradkern.aggregators.solvers.active_set import complementary
from gradkern.aggregators.solvers.arrays import Array, positions, space
from gradkern.aggregators.solvers.scaling import scaled


def best_in_ball(M: Array, p: Array, c: float, among: Array | None = None) -> Array:
    """Return y; the vector is d = Jᵀ(p + y).

    Args:
        M: (..., T, T), Gramians of the rows J; leading dimensions are independent problems.
        p: (..., T), the weights of g₀.
        c: the radius of the ball relative to ‖g₀‖, at least 0.
        among: (..., T) bool, the rows that count, for g₀ too; None for all.

    Returns:
        (..., T), y >= 0. A zero row gets 0. A problem with an entry that is not finite gets NaN. If the hull of the
        rows contains 0, several vectors may be best. Then y is large, up to 7e6 c‖g₀‖ / n_i, and nearly cancels. More
        rows than dimensions whose lengths span twelve orders of magnitude may keep a ridge, one problem in a hundred.
    """
    xp = space(M)
    problem = scaled(M, among)
    K, n, rows, _ = problem
    longest = xp.amax(xp.where(rows, n, 0.0), -1)[..., None]
    center = xp.where(rows, p * (n / longest), 0.0)
    slope = xp.where(rows, (K @ center[..., None])[..., 0], 0.0)
    square = (c * c) * (center * slope).sum(-1)
    R = xp.stack((xp.amin(n, -1)[..., None] / n, -slope), -1)
    first = xp.where(rows, slope * n, xp.inf).argmin(-1)[..., None] == positions(n)
    return problem.weights(complementary(K, R, first & rows, square) * longest)


def ball_residual(M: Array, p: Array, y: Array, c: float) -> Array:
    """Return by how much y misses optimality (...): the largest violation of its conditions, relative to their terms.

    Rows are divided by their lengths, and zero rows do not count.
    """
    xp = space(M)
    K, n, rows, _ = scaled(M)
    v, center = xp.where(rows, y * n, 0.0), xp.where(rows, p * n, 0.0)
    slope = xp.where(rows, (K @ (center + v)[..., None])[..., 0], 0.0)
    size = (abs(v) + abs(center)).sum(-1)[..., None]
    mu = (v * slope).sum(-1)[..., None] / (v / n).sum(-1)[..., None].clip(1e-300)
    slack = xp.where(rows, slope - mu / n, 0.0)
    of_rows = xp.amax(abs(xp.minimum(slack, v)) / size, -1)
    squares = [(x * (K @ x[..., None])[..., 0]).sum(-1)[..., None] for x in (v, center)]
    return xp.maximum(of_rows, (abs(squares[0] - c * c * squares[1]) / size / size)[..., 0])
