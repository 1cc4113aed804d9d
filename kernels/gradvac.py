"""GradVac on a Gramian: coefficients that raise cosines to their targets (Wang et al. 2021, "Gradient Vaccine").

    c = e_i;  for j != i in the order of task i:
        phi = cos(c J, J_j) = (c M)_j / (n sqrt(M_jj)),  n = |c J| = sqrt(c M c^T)
        u = target, no further from 0 than eps - 1 and 1 - sqrt(eps)
        if phi < u: c_j += a,  a = n (u sqrt(1 - phi^2) - phi sqrt(1 - u^2)) / (sqrt(M_jj) sqrt(1 - u^2))
        target = (1 - beta) target + beta phi, corrected or not

A program follows one task i through its partners (``projection_order.py``) in float64, with d = c M and e = |c| |M|
kept up to date. c M c^T of rows that nearly cancel is rounding error, of any sign: up to
eps * sum |c_a M_ab c_b| = eps * |c| e it counts as zero. Targets beyond 1 - sqrt(eps) are not aimed at, as
``gradkern/aggregators/gradvac.py`` explains. Comparisons with NaN are false: a pair without two positive lengths is
left alone, and so is its target.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .projection_order import clamp, key_arguments, next_partner, pick


class Targets(NamedTuple):
    """The targets, and which of them move."""

    targets: Tensor
    """(S, T, T) float64."""
    update_mask: Tensor
    """(T,) bool: whether the targets of task i move."""


@triton.jit
def length(c, d, e, eps):
    """|c J|, zero where it is nothing but rounding error."""
    square = tl.sum(c * d, 0)
    return tl.sqrt(tl.where(square > eps * tl.sum(tl.abs(c) * e, 0), square, 0.0))


@triton.jit
def vaccinated(matrices, i_task, T, beta, eps, TASKS: tl.constexpr):
    """(TASKS,) float64, the coefficients of task ``i_task``, and as many targets of it, moved.

    ``matrices`` are the pointers of a segment's Gramian, order keys and targets, each (T, T). ``eps`` is float64. TASKS
    is the power of two that holds T.
    """
    p_M, p_order_keys, p_targets = matrices
    i_partner = tl.arange(0, TASKS)
    m_partner = i_partner < T
    o_row = tl.cast(i_task, tl.int64) * T

    m_left = m_partner & (i_partner != i_task)
    order_keys = tl.load(p_order_keys + o_row + i_partner, mask=m_left, other=0.0)
    targets = tl.load(p_targets + o_row + i_partner, mask=m_partner, other=0.0)
    c = tl.where(i_partner == i_task, 1.0, 0.0).to(tl.float64)
    d = tl.load(p_M + o_row + i_partner, mask=m_partner, other=0.0).to(tl.float64)
    e = tl.abs(d)
    n = length(c, d, e, eps)
    highest = 1 - tl.sqrt(eps)
    for _ in range(1, T):
        j = next_partner(order_keys, m_left, i_partner, TASKS)
        m_left = m_left & (i_partner != j)
        M_j = tl.load(p_M + j.to(tl.int64) * T + i_partner, mask=m_partner, other=0.0).to(tl.float64)
        M_jj = pick(M_j, i_partner, j)
        if (n > 0) & (M_jj > 0):
            root = tl.sqrt(M_jj)
            # phi = cos(c J, J_j)
            phi = clamp(pick(d, i_partner, j) / n / root, 1.0)
            target = pick(targets, i_partner, j)
            u = tl.minimum(tl.maximum(target, eps - 1), highest)
            if phi < u:
                # a = n (u sqrt(1 - phi^2) - phi sqrt(1 - u^2)) / (sqrt(M_jj) sqrt(1 - u^2))
                sine = tl.sqrt(1 - u * u)
                a = n * (u * tl.sqrt(1 - phi * phi) - phi * sine) / (root * sine)
                c_j = pick(c, i_partner, j)
                e += (tl.abs(c_j + a) - tl.abs(c_j)) * tl.abs(M_j)
                c += tl.where(i_partner == j, a, 0.0)
                d += a * M_j
                n = length(c, d, e, eps)
            # target = (1 - beta) target + beta phi
            targets = tl.where(i_partner == j, (1 - beta) * target + beta * phi, targets)
    return c, targets


@kernel
def gradvac_kernel(
    p_M,
    p_order_keys,
    s_order_keys: tl.int64,
    p_targets,
    p_update_mask,
    beta: tl.float64,
    p_eps,
    p_C,
    T: tl.int64,
    EPS: tl.constexpr,
    TASKS: tl.constexpr,
):
    """One program: segment s, task i. EPS is the epsilon of all segments without ``p_eps``."""
    i_segment = tl.program_id(0).to(tl.int64)
    i_task = tl.program_id(1)
    i_partner = tl.arange(0, TASKS)
    eps = tl.full((), EPS, tl.float64)
    if p_eps is not None:
        eps = tl.load(p_eps + i_segment)
    o_segment = i_segment * T * T
    matrices = (p_M + o_segment, p_order_keys + i_segment * s_order_keys, p_targets + o_segment)
    c, targets = vaccinated(matrices, i_task, T, beta, eps, TASKS)
    o = o_segment + i_task.to(tl.int64) * T + i_partner
    tl.store(p_C + o, c.to(p_C.dtype.element_ty), mask=i_partner < T)
    update = tl.load(p_update_mask + i_task) != 0
    tl.store(p_targets + o, targets, mask=(i_partner < T) & update)


def gradvac(M: Tensor, order_keys: Tensor, state: Targets, beta: float, eps: Tensor | None, C: Tensor) -> Launch:
    """Fill ``C`` (S, T, T) from ``M`` (S, T, T) and ``order_keys`` (S, T, T) or (1, T, T), and move the targets.

    ``eps`` (S,) is float64, or None for the epsilon of M's dtype. All tensors are contiguous.
    """
    S, T, _ = M.shape
    arguments = {
        "p_M": M,
        **key_arguments(order_keys),
        "p_targets": state.targets,
        "p_update_mask": state.update_mask,
        "beta": beta,
        "p_eps": eps,
        "p_C": C,
        "T": T,
        "EPS": torch.finfo(M.dtype).eps,
        "TASKS": triton.next_power_of_2(T),
    }
    return Launch(gradvac_kernel, (S, T), arguments, 32 if T <= 32 else 64, fp_fusion=False)
