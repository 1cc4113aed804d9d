"""Convex problems with bounds, exactly: primal-dual active sets, for many problems at once.

The problems are to minimise ½ vᵀKv + pᵀv over v >= 0, and relatives of theirs with one more number. Optimal is

    v >= 0,  s = Kv + p >= 0,  and v_i = 0 or s_i = 0 for every i.

A set of free tasks, with s_i = 0 there and v_i = 0 elsewhere, gives v and s by one linear system. Primal-dual active
sets (Kostreva 1978; Hintermüller, Ito & Kunisch 2002) exchange every task whose number, v_i or s_i, is negative. That
solves nearly all problems within a few rounds, but may run in circles.

What is left is solved by a descent, as Lawson & Hanson (1974) solve least squares. It goes from v >= 0 straight towards
the v of the free tasks. Where numbers become 0 on the way, it stops, and their tasks leave the set. At the end of the
way all tasks with s_i < 0 join the set. The objective falls with every step, so that no set comes back. A ridge is
added to K, which makes the solution unique: first a large one, with which few rounds suffice, then smaller and smaller
ones, each starting from the solution before. Some T rounds do in all, half of those that tensors get. The result is the
solution with the smallest ridge for which there was time.
"""

from typing import NamedTuple

from gradkern.aggregators.solvers.arrays import Array, basic, every, identity, none, on_device, positive, rounds, space
from gradkern.ops import operators
from gradkern.ops.limits import ACTIVE_SET
from gradkern.ops.pytorch.backend import implements


class _Problem(NamedTuple):
    """The arguments of :func:`complementary`, and the identity matrix."""

    K: Array
    R: Array
    square: Array | None
    eye: Array


def nonnegative(K: Array, p: Array) -> Array:
    """Return the minimiser of ½ vᵀKv + pᵀv over v >= 0.

    Args:
        K: (..., T, T), symmetric and positive semidefinite, with a diagonal of about 1.
        p: (..., T). Leading dimensions are independent problems; those of K broadcast to those of p.

    Returns:
        (..., T). If there is no minimum, v is large: up to 5e13 times p. It is not finite if p is not, nor K on the
        tasks with v > 0.
    """
    free = p < 0
    if none(free):  # as for gradients without conflict
        return 0.0 * p
    return complementary(K, -p[..., None], free)


def complementary(K: Array, R: Array, free: Array, square: Array | None = None) -> Array:
    """Return v (..., T), optimal with p = -R c; see the module.

    Args:
        K: (..., T, T), as for :func:`nonnegative`.
        R: (..., T, 1), and c = 1; or (..., T, 2), and c = (λ, 1).
        free: (..., T), the tasks that are free at first.
        square: (...), with two columns of R. λ is the larger root of aλ² + 2bλ + q = ``square``, or where the left side
            is the least, with the entries a, b, q (11, 12, 22) of RᵀK⁻¹R, K and R on the free tasks.
    """
    return (operators.active_set if on_device(K) else _complementary)(K, R, free, square)


def _complementary(K: Array, R: Array, free: Array, square: Array | None = None) -> Array:
    """Return the result of :func:`complementary`; on a device, where there is no kernel for it."""
    problem = _Problem(K, R, square, identity(K))
    G = K + ACTIVE_SET.last_ridge * problem.eye
    for k in range(ACTIVE_SET.plain_rounds):
        x = _point(problem, G, free)
        if every(x >= 0):  # as mostly on a CPU: there is no need to know what noise is
            return x * free
        if k == 0:
            below = -ACTIVE_SET.noise * abs(R[..., -1]).sum(-1)[..., None]
        bad = ~(x >= (below if square is None else below * ~free))  # what is not a number is bad, too
        if none(bad):
            return _inside(x, free)
        free = free ^ bad
    return space(K).where(bad.any(-1)[..., None], _by_ridges(problem, free), _inside(x, free))


implements(operators.active_set)(_complementary)


def kkt_residual(K: Array, p: Array, v: Array) -> Array:
    """Return by how much v misses being :func:`nonnegative`'s (...): the largest violation, relative to the terms."""
    xp = space(K)
    s = (K @ v[..., None])[..., 0] + p
    size = abs(v).sum(-1) + xp.amax(abs(p), -1)
    return xp.amax(abs(xp.minimum(s, v)), -1) / xp.where(size > 0, size, 1.0)


def _point(problem: _Problem, G: Array, free: Array) -> Array:
    """Return x (..., T), v for the free tasks and s for the others, with the matrix G in place of K."""
    _, R, square, eye = problem
    X = basic(G, free, R, eye)
    if square is None:
        return X[..., 0]
    xp = space(G)
    S = R.swapaxes(-1, -2) @ xp.where(free[..., None], X, 0.0)
    a, b, q = S[..., 0, 0], S[..., 0, 1], S[..., 1, 1]
    root = (xp.sqrt((b * b - a * (q - square)).clip(0)) - b) / a
    return root[..., None] * X[..., 0] + X[..., 1]


def _inside(x: Array, free: Array) -> Array:
    """Return v from x."""
    return positive(x * free)


def _by_ridges(problem: _Problem, free: Array) -> Array:
    """Return v with smaller and smaller ridges; see the module. It is not a number if K or R is not finite."""
    K, R, square, eye = problem
    xp = space(K)
    sound = (xp.isfinite(K).all(-1) & xp.isfinite(R).all(-1)).all(-1)[..., None]
    K, R = xp.where(sound[..., None], K, eye), xp.where(sound[..., None], R, 0.0)
    problem = problem._replace(R=R)
    size = abs(R[..., -1]).sum(-1)[..., None]
    v = solution = 0.0 * (free * R[..., 0])
    ridge = v[..., :1] + ACTIVE_SET.first_ridge
    for _ in rounds(K, ACTIVE_SET.rounds(K.shape[-1])):
        x = _point(problem, K + ridge[..., None] * eye, free)
        terms = (abs(x) * free).sum(-1)[..., None]
        terms = size + terms if square is None else size * ~free + terms
        bad = ~(x >= -(ridge / 10).clip(ACTIVE_SET.noise) * terms)
        crossed = bad & free
        part = xp.where(crossed, v / (v - x), xp.inf)  # of the way to x, at whose end a number is 0
        first = xp.amin(part, -1)[..., None]
        done = ~bad.any(-1)[..., None]
        solution = xp.where(done, _inside(x, free), solution)
        if every(done & (ridge <= ACTIVE_SET.last_ridge)):
            break
        v = xp.where(free, v + first.clip(None, 1.0) * (x - v), 0.0).clip(0)
        free = free ^ (bad & (part <= first))
        ridge = xp.where(done, (ridge * ACTIVE_SET.next_ridge).clip(ACTIVE_SET.last_ridge), ridge)
    return xp.where(sound, solution, xp.nan)
