"""Eigenvalues and eigenvectors of symmetric matrices by Jacobi's rotations, a program for each matrix.

    A <- Rᵀ A R,   V <- V R,   R rotates rows and columns p and q so that A[p, q] becomes 0

The pairs (p, q) of a round are disjoint, and a sweep is a tournament in which every two rows meet once. Matrices lie in
memory, which is the first-level cache, because a round takes its rows and columns in another order than the last.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .settings import solver_threads


@triton.jit
def pairs_of(i_round, i_pair, T):
    """(p, q, whether there is such a pair) of one round of a tournament with T players, or T + 1 if T is odd.

    The last player stays, and the others go round.
    """
    n = T + T % 2 - 1
    p = (i_round + i_pair) % n
    q = tl.where(i_pair == 0, n, (i_round + n - i_pair) % n)
    return p, q, (2 * i_pair <= n) & (p < T) & (q < T)


@triton.jit
def rotate(p_A, p, q, c, s, m, T, BY_ROW: tl.constexpr, N: tl.constexpr):
    """Rotate rows p and q of a matrix in memory (BY_ROW), or its columns."""
    j = tl.arange(0, N)
    step = T if BY_ROW else 1
    along = 1 if BY_ROW else T
    m_entries = m[:, None] & (j[None, :] < T)
    a_p = p_A + p[:, None] * step + j[None, :] * along
    a_q = p_A + q[:, None] * step + j[None, :] * along
    x = tl.load(a_p, mask=m_entries, other=0.0)
    y = tl.load(a_q, mask=m_entries, other=0.0)
    tl.store(a_p, c[:, None] * x - s[:, None] * y, mask=m_entries)
    tl.store(a_q, s[:, None] * x + c[:, None] * y, mask=m_entries)


@kernel
def jacobi_kernel(p_A, p_V, T: tl.int32, sweeps: tl.int32, noise: tl.float64, N: tl.constexpr, PAIRS: tl.constexpr):
    """One program: one matrix."""
    i_problem = tl.program_id(0).to(tl.int64)
    p_A += i_problem * T * T
    p_V += i_problem * T * T
    i_pair = tl.arange(0, PAIRS)
    left = 1
    i_sweep = 0
    while (left > 0) & (i_sweep < sweeps):
        left = 0
        for i_round in range(T + T % 2 - 1):
            p, q, m = pairs_of(i_round, i_pair, T)
            a_pp = tl.load(p_A + p * (T + 1), mask=m, other=1.0)
            a_qq = tl.load(p_A + q * (T + 1), mask=m, other=1.0)
            a_pq = tl.load(p_A + p * T + q, mask=m, other=0.0)
            # tan(φ) of the rotation, the smaller one of two: t² + 2 τ t = 1
            tau = (a_qq - a_pp) / (2 * tl.where(a_pq == 0, 1.0, a_pq))
            t = tl.where(tau < 0, -1.0, 1.0) / (tl.abs(tau) + tl.sqrt(1 + tau * tau))
            t = tl.where(a_pq == 0, 0.0, t)
            c = 1 / tl.sqrt(1 + t * t)
            large = tl.abs(a_pq) > noise * tl.sqrt(tl.abs(a_pp)) * tl.sqrt(tl.abs(a_qq))
            left = tl.maximum(left, tl.max(large.to(tl.int32), 0))
            tl.debug_barrier()  # all have read the entries that others are about to write
            rotate(p_A, p, q, c, c * t, m, T, True, N)
            tl.debug_barrier()
            rotate(p_A, p, q, c, c * t, m, T, False, N)
            rotate(p_V, p, q, c, c * t, m, T, False, N)
            tl.debug_barrier()
        i_sweep += 1


def jacobi(A: Tensor, V: Tensor, sweeps: int, noise: float) -> Launch:
    """Turn ``A`` (S, T, T) into diagonal matrices, and ``V``, which starts as the identity, into eigenvectors.

    Both are float64 and contiguous. A sweep in which all entries off the diagonal are at most ``noise``, relative to
    the two on it, is the last one.
    """
    S, T, _ = A.shape
    N = triton.next_power_of_2(T)
    arguments = {
        "p_A": A,
        "p_V": V,
        "T": T,
        "sweeps": sweeps,
        "noise": noise,
        "N": N,
        "PAIRS": max(1, N // 2),
    }
    return Launch(jacobi_kernel, (S,), arguments, solver_threads(T), fp_fusion=False)
