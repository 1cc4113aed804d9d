"""Weights with which every task's gain follows its weight: M w = (s / w)^(1/α), w > 0.

Nash bargaining (Navon et al. 2022) is α = 1, α-fairness (Ban & Ji 2024) is any α > 0. In the scale of the cosines K,
with n_i = √M_ii, v = n w, γ = 1/α and a_i = (s_i n_i)^γ / n_i, the equations are

    K v = a v^(-γ),  v > 0,

and they say that v minimises a convex function, ½ vᵀKv - Σ_i a_i ∫ v_i^(-γ). With t = K v as numbers of their own they
are t v^γ = a. Newton's method for both, in which neither may lose its sign, takes 4 to 8 rounds, and some 30 for nearly
antiparallel rows of very different lengths.

If the hull of the rows contains 0, there is no solution. Then 1e-6 is added to the diagonal of K.
"""

from gradkern.aggregators.solvers.arrays import Array, every, identity, on_device, rounds, solved, space
from gradkern.aggregators.solvers.scaling import scaled
from gradkern.ops import operators
from gradkern.ops.limits import FAIR
from gradkern.ops.pytorch.backend import implements

RIDGE = 1e-6
"""It bounds the weights of unit rows by 1e3."""
APART = 100 * FAIR.apart
"""The square of the distance of 0 from the hull of the unit rows, below which rounding decides about the solution."""


def fair(M: Array, alpha: float = 1.0, s: Array | float = 1.0, among: Array | None = None) -> Array:
    """Return the weights w > 0 with M w = (s / w)^(1/alpha).

    Args:
        M: (..., T, T), Gramians; leading dimensions are independent problems.
        alpha: greater than 0. From 0.5 to 4 the rounds suffice for rows whose lengths span six orders of magnitude.
        s: (..., T), greater than 0, or a number.
        among: (..., T) bool, the tasks that take part; None for all. The others get the weight 0.

    Returns:
        (..., T). A zero row is left out and gets the weight 0. If the hull of the rows contains 0, or comes within 1e-6
        of their length, the weights are those with a ridge; see the module. A problem with an entry that is not finite
        gets NaN.
    """
    xp = space(M)
    problem = scaled(M, among)
    K, n, rows, _ = problem
    gamma = 1 / alpha
    # For rows divided by the longest, whose powers do not overflow: w = longest^(-2 / (1 + γ)) of their weights.
    longest = xp.amax(xp.where(rows, n, 0.0), -1)[..., None]
    relative = xp.where(rows, n / longest, 1.0)
    a = xp.where(rows, (relative * s) ** gamma / relative, 1.0)
    newton = operators.fair if on_device(K) else _newton
    plain, ridged = newton(xp.stack((K, K + RIDGE * identity(K)), 0), a, gamma)
    Kv, total = (K @ plain[..., None])[..., 0], plain.sum(-1)
    goal = a * plain**-gamma
    met = (abs(Kv - goal) <= 1e-10 * (goal + total[..., None])).all(-1)
    v = xp.where((met & ((plain * Kv).sum(-1) > APART * total * total))[..., None], plain, ridged)
    return problem.weights(v) * longest ** (1 - 2 / (1 + gamma))


def _newton(K: Array, a: Array, gamma: float) -> Array:
    """Return v (..., T) with K v = a v^(-γ), for symmetric positive semidefinite K (..., T, T) with a diagonal of 1."""
    xp = space(K)
    v = a ** (1 / (1 + gamma))  # the solution if K is the identity, scaled so that vᵀ(K v - a v^(-γ)) = 0
    stretch = (v * v).sum(-1) / (v * (K @ v[..., None])[..., 0]).sum(-1).clip(1e-9)
    v = v * (stretch ** (1 / (1 + gamma)))[..., None]
    both = xp.stack((v, a * v**-gamma), 0)
    done = stretch < 0  # none
    last = stretch + xp.inf
    for _ in rounds(K, FAIR.rounds):
        v, t = both
        goal = a * v**-gamma
        H = K + (gamma * t / v)[..., None] * identity(K)
        d = solved(H, (goal - (K @ v[..., None])[..., 0])[..., None])[..., 0] / v
        change = xp.stack((d, goal / t - 1 - gamma * d), 0)
        step = 1 / xp.amax(xp.maximum(change / -FAIR.fall, change / FAIR.growth), -1).clip(1)
        both = xp.where(done[..., None], both, both * (1 + step[..., None] * change))
        size = xp.amax(abs(change), (0, -1))
        # Also done is what only rounding changes, and what has no solution.
        settled = (size <= FAIR.close) | ((size >= last) & (last <= FAIR.near))
        done = done | settled | ((v * t).sum(-1) < FAIR.apart * v.sum(-1) ** 2)
        last = size
        if every(done):
            break
    return both[0]


implements(operators.fair)(_newton)


def fair_residual(M: Array, w: Array, alpha: float = 1.0, s: Array | float = 1.0) -> Array:
    """Return by how much w misses its equations (...): the largest (Mw)_i (w_i / s_i)^(1/alpha) - 1.

    It is relative to the terms, Σ_j |M_ij| w_j and 1. Zero rows do not count.
    """
    xp = space(M)
    rows = M.diagonal(0, -2, -1) > 0
    factor = (w / s) ** (1 / alpha)
    gain, terms = ((X @ w[..., None])[..., 0] * factor for X in (M, abs(M)))
    return xp.amax(xp.where(rows, abs(gain - 1) / (1 + terms), 0.0), -1)
