"""The order in which a task visits the others: by ascending keys, equal ones by number.

Drawing a random order is drawing random keys, and nothing is sorted: each step looks for the least key that is left.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def key_arguments(order_keys: Tensor | None) -> dict[str, Any]:
    """Return the arguments that describe ``order_keys`` (S, T, T) or (1, T, T): address, and stride of the segments."""
    one = order_keys is None or len(order_keys) == 1
    return {"p_order_keys": order_keys, "s_order_keys": 0 if one else order_keys.stride(0)}


@triton.jit
def next_partner(order_keys, m_left, i_partner, TASKS: tl.constexpr):
    """The partner of least key among those of ``m_left``, TASKS if none is left. A key may be infinite, never NaN."""
    key = tl.min(tl.where(m_left, order_keys, float("inf")), 0)
    return tl.min(tl.where(m_left & (order_keys == key), i_partner, TASKS), 0)


@triton.jit
def cosine_keys(squares, M_i, i_partner, i_task, sign):
    """Keys by which the partner of least ``sign`` times its cosine comes first, as ``gradkern/ops/cosines.py`` has it.

    ``squares`` is the diagonal of M (T, T) and ``M_i`` the task's row of it, in float64. NaN comes last.
    """
    roots = tl.sqrt(squares)
    root = pick(roots, i_partner, i_task)
    # phi_ij = M_ij / sqrt(M_ii) / sqrt(M_jj), 0 where either is zero
    phi = tl.where(root != 0, tl.where(roots != 0, clamp(M_i / root / roots, 1.0), 0.0), 0.0)
    return tl.where(phi == phi, sign * phi, float("inf"))


@triton.jit
def clamp(x, limit):
    """``x`` within ``limit`` on both sides of zero, NaN if it is."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def pick(values, i_partner, j):
    """``values[j]`` of a vector in registers."""
    return tl.sum(tl.where(i_partner == j, values, 0.0), 0)
