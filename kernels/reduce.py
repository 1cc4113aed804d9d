"""Gramian, second stage: the partial sums of each segment's pieces, added in a fixed order.

    M[s, i, j] = M[s, j, i] = sum over the pieces c of segment s of partials[c, i (i + 1) / 2 + j],  j <= i

in float64, which is cheap for so few numbers: the length of the sum costs no accuracy, and no atomics means the same
input gives the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel

PIECES = 512
PAIRS = 8  # a 32-byte sector of float32 partials


@kernel
def reduce_kernel(p_partials, p_bounds, p_M, T: tl.int64, PIECES: tl.constexpr, PAIRS: tl.constexpr):
    """One program: segment s, row i, PAIRS columns j <= i."""
    i_segment = tl.program_id(0).to(tl.int64)
    i_row = tl.program_id(1).to(tl.int64)
    i_left = tl.program_id(2) * PAIRS
    if i_left > i_row:
        return
    i_column = i_left + tl.arange(0, PAIRS)
    m_column = i_column <= i_row
    n_pairs = T * (T + 1) // 2
    i_pair = i_row * (i_row + 1) // 2 + i_column

    i_first = tl.load(p_bounds + i_segment)
    i_last = tl.load(p_bounds + i_segment + 1)
    acc = tl.zeros((PIECES, PAIRS), tl.float64)
    for i_start in range(i_first, i_last, PIECES):
        i_piece = i_start + tl.arange(0, PIECES)
        mask = (i_piece < i_last)[:, None] & m_column[None, :]
        acc += tl.load(p_partials + i_piece[:, None] * n_pairs + i_pair[None, :], mask=mask, other=0.0).to(tl.float64)

    total = tl.sum(acc, 0).to(p_M.dtype.element_ty)
    p_M += i_segment * T * T
    tl.store(p_M + i_row * T + i_column, total, mask=m_column)
    tl.store(p_M + i_column.to(tl.int64) * T + i_row, total, mask=m_column)


def reduce(partials: Tensor, bounds: Tensor, M: Tensor) -> Launch:
    """Fill ``M`` (S, T, T); segment s owns the rows ``bounds[s]:bounds[s + 1]`` of ``partials``, zeros if none."""
    S, T, _ = M.shape
    arguments = {
        "p_partials": partials,
        "p_bounds": bounds,
        "p_M": M,
        "T": T,
        "PIECES": PIECES,
        "PAIRS": PAIRS,
    }
    return Launch(reduce_kernel, (S, T, triton.cdiv(T, PAIRS)), arguments, 256, fp_fusion=False)
