"""Convex problems with bounds, a program each: primal-dual active sets, then a descent with smaller and smaller ridges.

``gradkern/aggregators/solvers/active_set.py`` explains the algorithm, whose rounds these are. PyTorch takes some 30
launches for a round and cannot end before the last one. A program ends when its problem is solved.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .basic_solution import basic_solution, load_problem
from .launch import Launch, kernel
from .settings import solver_threads


@triton.jit
def point(K, ridge, R_1, R_2, free, square, T, N: tl.constexpr, SCALED: tl.constexpr):
    """(N,), v for the free tasks and s for the others, with ``ridge`` on the diagonal of K.

    If SCALED, the right side is λ R_1 + R_2, with λ so that a λ² + 2 b λ + q = ``square``; else it is R_2.
    """
    i = tl.arange(0, N)
    G = K + tl.where(i[:, None] == i[None, :], ridge, 0.0)
    x_1, x_2 = basic_solution(G, R_1, R_2, free, T, N)
    if SCALED:
        a = tl.sum(tl.where(free, R_1 * x_1, 0.0), 0)
        b = tl.sum(tl.where(free, R_1 * x_2, 0.0), 0)
        q = tl.sum(tl.where(free, R_2 * x_2, 0.0), 0)
        x_2 += (tl.sqrt(tl.maximum(b * b - a * (q - square), 0.0)) - b) / a * x_1
    return x_2


@triton.jit
def inside(x, free):
    """v from x."""
    return tl.where(free & (x > 0), x, 0.0)


@kernel
def active_set_kernel(
    p_K,
    p_R,
    p_free,
    p_square,
    p_v,
    T: tl.int32,
    plain_rounds: tl.int32,
    rounds: tl.int32,
    first_ridge: tl.float64,
    next_ridge: tl.float64,
    last_ridge: tl.float64,
    noise: tl.float64,
    N: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One program: one problem."""
    i_problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    m = i < T
    K = load_problem(p_K + i_problem * T * T, T, i, N)
    free = tl.load(p_free + i_problem * T + i, mask=m, other=0) != 0
    if SCALED:
        R_1 = tl.load(p_R + (i_problem * T + i) * 2, mask=m, other=0.0)
        R_2 = tl.load(p_R + (i_problem * T + i) * 2 + 1, mask=m, other=0.0)
        square = tl.load(p_square + i_problem)
    else:
        R_2 = tl.load(p_R + i_problem * T + i, mask=m, other=0.0)
        R_1 = R_2
        square = 0.0
    size = tl.sum(tl.abs(R_2), 0)
    n_bad = 1
    i_round = 0
    x = R_2 * 0.0
    while (n_bad > 0) & (i_round < plain_rounds):
        x = point(K, last_ridge, R_1, R_2, free, square, T, N, SCALED)
        below = size * noise
        if SCALED:
            below = tl.where(free, 0.0, below)
        bad = (x >= -below) == 0
        n_bad = tl.sum(bad.to(tl.int32), 0)
        if n_bad > 0:
            free = free != bad
        i_round += 1
    v = inside(x, free)
    if n_bad > 0:
        broken = tl.sum(tl.sum(K - K, 0) + (R_1 - R_1) + (R_2 - R_2), 0)  # 0, or NaN where one is not finite
        v = tl.zeros((N,), tl.float64)
        solution = v + broken
        ridge = first_ridge
        left = tl.where(broken == 0, 1, 0)
        i_round = 0
        while (left > 0) & (i_round < rounds):
            x = point(K, ridge, R_1, R_2, free, square, T, N, SCALED)
            terms = tl.sum(tl.where(free, tl.abs(x), 0.0), 0)
            if SCALED:
                terms += tl.where(free, 0.0, size)
            else:
                terms += size
            bad = (x >= -tl.maximum(ridge / 10, noise) * terms) == 0
            part = tl.where(bad & free, v / (v - x), float("inf"))
            first = tl.min(part, 0)
            if tl.sum(bad.to(tl.int32), 0) == 0:
                solution = inside(x, free)
                left = tl.where(ridge <= last_ridge, 0, 1)
                ridge = tl.maximum(ridge * next_ridge, last_ridge)
            v = inside(v + tl.minimum(first, 1.0) * (x - v), free)
            free = free != (bad & (part <= first))
            i_round += 1
        v = solution
    tl.store(p_v + i_problem * T + i, v, mask=m)


def active_set(
    K: Tensor,
    R: Tensor,
    free: Tensor,
    square: Tensor | None,
    v: Tensor,
    limits: Mapping[str, float],
) -> Launch:
    """Fill ``v`` (S, T) with the solutions of S problems, all float64 and contiguous.

    ``K`` is (S, T, T), ``R`` (S, T, 1), or (S, T, 2) with ``square`` (S,), and ``free`` (S, T) bool. ``limits`` are the
    kernel's arguments of the same names.
    """
    S, T = free.shape
    arguments = {
        "p_K": K,
        "p_R": R,
        "p_free": free,
        "p_square": square,
        "p_v": v,
        "T": T,
        **limits,
        "N": triton.next_power_of_2(T),
        "SCALED": square is not None,
    }
    return Launch(active_set_kernel, (S,), arguments, solver_threads(T), fp_fusion=False)
