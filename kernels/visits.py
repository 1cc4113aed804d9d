"""In which order a task visits the others: by ascending keys, equal ones by number.

Drawing a random order is drawing random keys, and nothing is sorted: each step looks for the least key that is left.
"""

import triton
import triton.language as tl


@triton.jit
def next_partner(keys, m_left, i_partner, BLOCK: tl.constexpr):
    """The partner of least key among those of ``m_left``, BLOCK if none is left. A key may be infinite, never NaN."""
    key = tl.min(tl.where(m_left, keys, float("inf")), 0)
    return tl.min(tl.where(m_left & (keys == key), i_partner, BLOCK), 0)


@triton.jit
def pick(values, i_partner, j):
    """``values[j]`` of a vector in registers."""
    return tl.sum(tl.where(i_partner == j, values, 0.0), 0)
