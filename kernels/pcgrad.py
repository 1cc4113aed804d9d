"""PCGrad on a Gramian: the coefficients of every projected gradient (Yu et al. 2020, Algorithm 1).

    c = e_i;  for j != i in the order of task i:  s = (c M)_j;  if s < 0: c_j -= s / M_jj;  then C[i] = c

A program follows one task i through as many partners as it is to visit (``visits.py``), with d = c M kept up to date
instead of recomputed, in float64. Comparisons with NaN are false: a row with NaN is left alone.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .visits import next_partner, pick


@triton.jit
def projected(p_M, p_keys, i_task, T, visits, BLOCK: tl.constexpr):
    """(BLOCK,) float64, the coefficients of task ``i_task`` over a Gramian (T, T), zeros beyond the T-th."""
    i_partner = tl.arange(0, BLOCK)
    o_row = tl.cast(i_task, tl.int64) * T

    m_left = (i_partner < T) & (i_partner != i_task)
    keys = tl.load(p_keys + o_row + i_partner, mask=m_left, other=0.0)
    c = tl.where(i_partner == i_task, 1.0, 0.0).to(tl.float64)
    d = tl.load(p_M + o_row + i_partner, mask=i_partner < T, other=0.0).to(tl.float64)
    for _ in range(visits):
        j = next_partner(keys, m_left, i_partner, BLOCK)
        m_left = m_left & (i_partner != j)
        M_j = tl.load(p_M + j.to(tl.int64) * T + i_partner, mask=i_partner < T, other=0.0).to(tl.float64)
        M_jj = pick(M_j, i_partner, j)
        s = pick(d, i_partner, j)
        if (s < 0) & (M_jj > 0):
            # c_j -= s / M_jj
            coefficient = -s / M_jj
            c += tl.where(i_partner == j, coefficient, 0.0)
            d += coefficient * M_j
    return c


@kernel
def pcgrad_kernel(p_M, p_keys, s_keys: tl.int64, p_C, T: tl.int64, visits: tl.int32, BLOCK: tl.constexpr):
    """One program: segment s, task i."""
    i_segment = tl.program_id(0).to(tl.int64)
    i_task = tl.program_id(1)
    i_partner = tl.arange(0, BLOCK)
    c = projected(p_M + i_segment * T * T, p_keys + i_segment * s_keys, i_task, T, visits, BLOCK)
    p_C += (i_segment * T + i_task) * T
    tl.store(p_C + i_partner, c.to(p_C.dtype.element_ty), mask=i_partner < T)


def pcgrad(M: Tensor, keys: Tensor, visits: int, C: Tensor) -> Launch:
    """Fill ``C`` (S, T, T) from ``M`` (S, T, T) and ``keys`` (S, T, T) or (1, T, T), all contiguous.

    A task visits ``visits`` partners, of which it has T - 1.
    """
    S, T, _ = M.shape
    arguments = {
        "p_M": M,
        "p_keys": keys,
        "s_keys": T * T if len(keys) > 1 else 0,
        "p_C": C,
        "T": T,
        "visits": visits,
        "BLOCK": triton.next_power_of_2(T),
    }
    return Launch(pcgrad_kernel, (S, T), arguments, 32 if T <= 32 else 64)
