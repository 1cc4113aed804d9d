"""Weights with which every task's gain follows its weight, K v = a v^(-γ), a program for each problem.

``gradkern/aggregators/solvers/fair.py`` explains Newton's method for both v and t = K v, whose rounds these are.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .basic_solution import basic_solution, diagonal, load_problem
from .launch import Launch, kernel
from .settings import solver_threads


@triton.jit
def power(x, exponent):
    """``x ** exponent`` of positive numbers."""
    return tl.exp(exponent * tl.log(x))


@kernel
def fair_kernel(
    p_K,
    p_a,
    p_v,
    T: tl.int32,
    gamma: tl.float64,
    rounds: tl.int32,
    close: tl.float64,
    near: tl.float64,
    fall: tl.float64,
    growth: tl.float64,
    apart: tl.float64,
    N: tl.constexpr,
):
    """One program: one problem. Numbers beyond T are 1, and masked out of sums."""
    i_problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    m = i < T
    K = load_problem(p_K + i_problem * T * T, T, i, N)
    a = tl.load(p_a + i_problem * T + i, mask=m, other=1.0)
    v = power(a, 1 / (1 + gamma))
    inner = tl.where(m, v, 0.0)
    Kv = tl.sum(K * inner[None, :], 1)
    stretch = tl.sum(inner * inner, 0) / tl.maximum(tl.sum(inner * Kv, 0), 1e-9)
    v = tl.where(m, v * power(stretch, 1 / (1 + gamma)), 1.0)
    t = tl.where(m, a * power(v, -gamma), 1.0)
    last = stretch * 0 + float("inf")
    left = 1
    i_round = 0
    while (left > 0) & (i_round < rounds):
        goal = a * power(v, -gamma)
        inner = tl.where(m, v, 0.0)
        r = goal - tl.sum(K * inner[None, :], 1)
        d, _ = basic_solution(K + diagonal(gamma * t / v, i, N), r, r, m, T, N)
        of_v = tl.where(m, d / v, 0.0)
        of_t = tl.where(m, goal / t - 1 - gamma * of_v, 0.0)
        most = tl.maximum(tl.max(tl.maximum(of_v, of_t), 0) / growth, -tl.min(tl.minimum(of_v, of_t), 0) / fall)
        step = 1 / tl.maximum(most, 1.0)
        size = tl.max(tl.maximum(tl.abs(of_v), tl.abs(of_t)), 0)
        total = tl.sum(inner, 0)
        settled = (size <= close) | ((size >= last) & (last <= near)) | (tl.sum(inner * t, 0) < apart * total * total)
        left = tl.where(settled, 0, 1)
        v *= 1 + step * of_v
        t *= 1 + step * of_t
        last = size
        i_round += 1
    tl.store(p_v + i_problem * T + i, v, mask=m)


def fair(K: Tensor, a: Tensor, gamma: float, v: Tensor, limits: Mapping[str, float]) -> Launch:
    """Fill ``v`` (S, T) with the solutions for ``K`` (S, T, T) and ``a`` (S, T), all float64 and contiguous.

    ``limits`` are the kernel's arguments of the same names.
    """
    S, T = a.shape
    arguments = {
        "p_K": K,
        "p_a": a,
        "p_v": v,
        "T": T,
        "gamma": gamma,
        **limits,
        "N": triton.next_power_of_2(T),
    }
    return Launch(fair_kernel, (S,), arguments, solver_threads(T), fp_fusion=False)
