"""A symmetric positive definite system on some of its unknowns, by elimination without exchanges of rows.

    G v - s = r,   v = 0 outside of ``free`` and s = 0 inside

It is what the programs on T x T numbers solve in every round. A program holds the matrix in registers. A pivot takes
its row out of them and subtracts its multiples from the rows below, and from all rows outside of ``free``: what is left
of r there is -s. Positive definite matrices need no exchanges (Higham 2002, "Accuracy and Stability of Numerical
Algorithms", chapter 10).
"""

import triton
import triton.language as tl

from .projection_order import pick


@triton.jit
def basic_solution(G, r_1, r_2, free, T, N: tl.constexpr):
    """(N,) float64 twice: v inside of ``free`` and s outside, for the right sides ``r_1`` and ``r_2``.

    ``G`` (N, N) is float64, and N the power of two that holds T. What is beyond T is not free. Where a pivot is not
    positive, the results are not a number.
    """
    i_row = tl.arange(0, N)[:, None]
    i = tl.arange(0, N)
    is_free = free.to(tl.int32)
    for k in range(T):
        if tl.sum(tl.where(i == k, is_free, 0), 0) > 0:
            row = tl.sum(tl.where(i_row == k, G, 0.0), 0)
            # What is left of the matrix is symmetric, so that the row is the column, too.
            factor = tl.where((i > k) | (free == 0), row / positive(pick(row, i, k)), 0.0)
            G -= factor[:, None] * row[None, :]
            r_1 -= factor * pick(r_1, i, k)
            r_2 -= factor * pick(r_2, i, k)
    v_1 = tl.where(free, 0.0, -r_1)
    v_2 = tl.where(free, 0.0, -r_2)
    for below in range(T):
        k = T - 1 - below
        if tl.sum(tl.where(i == k, is_free, 0), 0) > 0:
            row = tl.sum(tl.where(i_row == k, G, 0.0), 0)
            pivot = positive(pick(row, i, k))
            row = tl.where(free & (i > k), row, 0.0)
            v_1 = tl.where(i == k, (pick(r_1, i, k) - tl.sum(row * v_1, 0)) / pivot, v_1)
            v_2 = tl.where(i == k, (pick(r_2, i, k) - tl.sum(row * v_2, 0)) / pivot, v_2)
    return v_1, v_2


@triton.jit
def positive(x):
    """``x``, or NaN if it is not positive."""
    return tl.where(x > 0, x, float("nan"))


@triton.jit
def diagonal(x, i, N: tl.constexpr):
    """(N, N), the matrix with ``x`` (N,) on its diagonal; ``i`` are the numbers of its rows."""
    return tl.where(i[:, None] == i[None, :], x[:, None], 0.0)


@triton.jit
def load_problem(p_K, T, i, N: tl.constexpr):
    """(N, N) float64, a matrix (T, T) in memory; beyond it the identity."""
    m = (i[:, None] < T) & (i[None, :] < T)
    one = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    return tl.where(m, tl.load(p_K + i[:, None] * T + i[None, :], mask=m, other=0.0), one)
