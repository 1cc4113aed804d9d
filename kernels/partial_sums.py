"""Partial sums of the one launch (``surgery.py``): folded by many programs, into the Gramian of a segment.

Partials lie pair by pair, (pairs, pieces). Sums are in float64 and in a fixed order, so that the same input gives the
same bits, whichever program adds them up. What another program has written is read past the first cache, which does not
hear of it.
"""

import triton
import triton.language as tl


@triton.jit
def sum_pairs(p, s_pair, i_first, n, PAIRS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr):
    """(ROWS,) float64, of each pair the sum of the ``n`` numbers from ``i_first`` on; ROWS is PAIRS or more."""
    i_pair = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, FOLD), tl.float64)
    for o_start in range(0, n, FOLD):
        o = o_start + tl.arange(0, FOLD)
        m = (i_pair < PAIRS)[:, None] & (o < n)[None, :]
        x = tl.load(p + i_pair[:, None] * s_pair + (i_first + o)[None, :], mask=m, other=0.0, cache_modifier=".cg")
        acc += x.to(tl.float64)
    return tl.sum(acc, 1)


@triton.jit
def store_symmetric(p_M, total, T: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """Write M (T, T) from its pairs, (i, j) with j <= i being number i (i + 1) / 2 + j; whether all are finite."""
    i_pair = tl.arange(0, ROWS)
    i = tl.zeros_like(i_pair)
    for row in tl.static_range(1, T):
        i += (i_pair >= row * (row + 1) // 2).to(tl.int32)
    j = i_pair - i * (i + 1) // 2
    M = total.to(p_M.dtype.element_ty)
    tl.store(p_M + i * T + j, M, mask=i_pair < PAIRS)
    tl.store(p_M + j * T + i, M, mask=i_pair < PAIRS)
    return tl.sum((M - M != 0).to(tl.int32), 0) == 0
