"""In which order a task visits the others: by ascending keys, equal ones by number.

Drawing a random order is drawing random keys, and nothing is sorted: each step looks for the least key that is left.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def key_arguments(keys: Tensor | None) -> dict[str, Any]:
    """What a kernel is told of ``keys`` (S, T, T) or (1, T, T): where they are, and how far apart the segments' are."""
    return {"p_keys": keys, "s_keys": 0 if keys is None or len(keys) == 1 else keys.stride(0)}


@triton.jit
def next_partner(keys, m_left, i_partner, BLOCK: tl.constexpr):
    """The partner of least key among those of ``m_left``, BLOCK if none is left. A key may be infinite, never NaN."""
    key = tl.min(tl.where(m_left, keys, float("inf")), 0)
    return tl.min(tl.where(m_left & (keys == key), i_partner, BLOCK), 0)


@triton.jit
def cosine_keys(p_M, M_i, i_partner, i_task, T, sign):
    """Keys by which the partner of least ``sign`` times its cosine comes first, as ``gradkern/ops/cosines.py`` has it.

    ``M_i`` is the task's row of M (T, T), in float64. What is no number comes last.
    """
    o_square = i_partner.to(tl.int64) * (T + 1)
    roots = tl.sqrt(tl.load(p_M + o_square, mask=i_partner < T, other=1.0).to(tl.float64))
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
