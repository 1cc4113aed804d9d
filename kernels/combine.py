"""Weighted sum of the rows, one read and one write.

    out[e] = sum_t w[s, t] * J[t, e]      s the segment of e

A program owns a tile. It walks the rows in groups of four whose loads are all in flight together, so the number of
rows is a run-time value and no T compiles a kernel of its own. A row of weight exactly 0 is not read, and what
stands in it, NaN included, does not reach the result; nor is a missing one.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .rows import Rows, load_full, load_part, load_tile, row_address, row_arguments, store_row
from .settings import combine_setting


@triton.jit(do_not_specialize=["p_rows", "s_row", "p_w", "p_out", "s_out", "T"])
def combine_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_w,
    p_out,
    s_out: tl.int64,
    T: tl.int64,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one tile, which is one block."""
    tl.static_assert(BLOCK == TILE)
    i_tensor, o_first, n, i_segment = load_tile(p_tiles, tl.program_id(0).to(tl.int64))
    o = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), ACC)
    for i_group in range(0, T, 4):
        a = ()
        w = ()
        low = n ^ TILE  # any bit left in it sends the tile down the slow road
        for t in tl.static_range(4):
            i_row = i_group + t
            w_row = tl.load(p_w + i_segment * T + i_row, mask=i_row < T, other=0.0)
            a_row = row_address(p_rows, s_row, i_row, i_tensor, o_first, w_row != 0, TABLE, D)
            low = low | (a_row & 15)
            a = a + (a_row,)
            w = w + (w_row,)
        if low == 0:
            x = ()
            for t in tl.static_range(4):
                x = x + (load_full(a[t], o, D),)
            for t in tl.static_range(4):
                acc += w[t] * x[t].to(ACC)
        else:
            for t in tl.static_range(4):
                acc += w[t] * load_part(a[t], o, n, D).to(ACC)
    a_out = row_address(p_out, s_out, 0, i_tensor, o_first, True, TABLE_OUT, D)
    store_row(a_out, o, n, acc, ((n ^ TILE) | (a_out & 15)) == 0, D)


def combine(rows: Rows, tiles: Tensor, tile: int, w: Tensor, out: Rows) -> Launch:
    """Fill the one row of ``out``; ``w`` (S, T) is in the arithmetic dtype of the rows, contiguous."""
    setting = combine_setting()
    arguments = {
        "p_tiles": tiles,
        "p_w": w,
        "p_out": out.source,
        "s_out": out.stride,
        "T": rows.count,
        "TABLE_OUT": out.table,
        "TILE": tile,
        "BLOCK": setting.BLOCK,
        **row_arguments(rows),
    }
    return Launch(combine_kernel, (len(tiles),), arguments, setting.threads)
