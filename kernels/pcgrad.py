"""PCGrad on a Gramian: the coefficients of every projected gradient (Yu et al. 2020, Algorithm 1).

    c = e_i;  for j != i in the order of task i:  s = (c M)_j;  if s < 0: c_j -= s / M_jj;  then C[i] = c

A program follows one task i through its partners (``projection_order.py``), with d = c M kept up to date instead of
recomputed, in float64. Comparisons with NaN are false: a row with NaN is left alone.

With order keys a task visits all partners in their order or, at random, the first. Without keys it follows cosines. It
visits the first or, for the average, all: the result is the mean of the projections, each from the original gradient
(Rhapsody on a Theme of Gradient Surgery, section 3.3). A task whose gradient is zero is nobody's partner. The kind of
partner is a number at run time, so that builds are two.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .projection_order import cosine_keys, key_arguments, next_partner, pick

PARTNERS = ("all", "random", "average", "most_similar", "most_different")
ALL, AVERAGE, MOST_SIMILAR = (tl.constexpr(PARTNERS.index(name)) for name in ("all", "average", "most_similar"))
"""Kernels know a partner by its number."""


def partner_arguments(order_keys: Tensor | None, partner: str) -> dict[str, Any]:
    """Return the arguments that describe ``order_keys``, which "all" and "random" alone have, and ``partner``."""
    return {**key_arguments(order_keys), "partner": PARTNERS.index(partner)}


@triton.jit
def projected(p_M, p_order_keys, partner, i_task, T, TASKS: tl.constexpr):
    """(TASKS,) float64, the coefficients of task ``i_task`` over a Gramian (T, T), zeros beyond the T-th.

    TASKS is the power of two that holds T.
    """
    i_partner = tl.arange(0, TASKS)
    o_row = tl.cast(i_task, tl.int64) * T

    m_partner = i_partner < T
    squares = tl.load(p_M + i_partner.to(tl.int64) * (T + 1), mask=m_partner, other=0.0).to(tl.float64)
    m_left = m_partner & (i_partner != i_task) & (squares != 0)
    c = tl.where(i_partner == i_task, 1.0, 0.0).to(tl.float64)
    d = tl.load(p_M + o_row + i_partner, mask=m_partner, other=0.0).to(tl.float64)
    if p_order_keys is not None:
        order_keys = tl.load(p_order_keys + o_row + i_partner, mask=m_left, other=0.0)
    else:
        order_keys = cosine_keys(squares, d, i_partner, i_task, tl.where(partner == MOST_SIMILAR, -1.0, 1.0))
    n_partners = tl.sum(m_left.to(tl.int32), 0)
    n_visits = tl.where((partner == ALL) | (partner == AVERAGE), n_partners, tl.minimum(n_partners, 1))
    for _ in range(n_visits):
        j = next_partner(order_keys, m_left, i_partner, TASKS)
        m_left = m_left & (i_partner != j)
        M_j = tl.load(p_M + j.to(tl.int64) * T + i_partner, mask=m_partner, other=0.0).to(tl.float64)
        M_jj = pick(M_j, i_partner, j)
        s = pick(d, i_partner, j)
        if (s < 0) & (M_jj > 0):
            # c_j -= s / M_jj
            coefficient = -s / M_jj
            if p_order_keys is not None:
                d += coefficient * M_j
            else:
                coefficient = coefficient / n_visits
            c += tl.where(i_partner == j, coefficient, 0.0)
    return c


@kernel
def pcgrad_kernel(p_M, p_order_keys, s_order_keys: tl.int64, partner: tl.int32, p_C, T: tl.int64, TASKS: tl.constexpr):
    """One program: segment s, task i."""
    i_segment = tl.program_id(0).to(tl.int64)
    i_task = tl.program_id(1)
    i_partner = tl.arange(0, TASKS)
    if p_order_keys is not None:
        p_order_keys += i_segment * s_order_keys
    c = projected(p_M + i_segment * T * T, p_order_keys, partner, i_task, T, TASKS)
    p_C += (i_segment * T + i_task) * T
    tl.store(p_C + i_partner, c.to(p_C.dtype.element_ty), mask=i_partner < T)


def pcgrad(M: Tensor, order_keys: Tensor | None, partner: str, C: Tensor) -> Launch:
    """Fill ``C`` (S, T, T) from ``M`` (S, T, T) and ``order_keys`` (S, T, T) or (1, T, T), or none, all contiguous."""
    S, T, _ = M.shape
    arguments = {
        "p_M": M,
        **partner_arguments(order_keys, partner),
        "p_C": C,
        "T": T,
        "TASKS": triton.next_power_of_2(T),
    }
    return Launch(pcgrad_kernel, (S, T), arguments, 32 if T <= 32 else 64, fp_fusion=False)
