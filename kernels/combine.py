"""Weighted sum of the rows, one read and one write.

    out[e] = sum_t w[s, t] * J[t, e]      s the segment of e

A program owns a tile. It walks the rows in groups of four whose loads are all in flight together, so the number of
rows is a run-time value and no T compiles a kernel of its own. A row of weight exactly 0 is not read, and what
stands in it, NaN included, does not reach the result; nor is a missing one. Under a mask (``masks.py``) what is
dropped is exactly 0, and each program adds the number of elements it kept to one integer: exact in any order.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .masks import DENSE, Mask, kept, load_state, load_units, mask_arguments, to_read
from .rows import Rows, load_full, load_part, load_tile, row_address, row_arguments, store_row
from .settings import combine_setting


@triton.jit
def weighted_sum(
    p_rows, s_row, p_w, T, tile, o, m_read, TABLE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr
):
    """The sum of the rows' elements ``o`` of a ``tile``, zeros beyond its end and without ``m_read``."""
    i_tensor, o_first, n, i_segment = tile
    acc = tl.zeros(o.shape, ACC)
    for i_group in range(0, T, 4):
        a = ()
        w = ()
        low = n ^ TILE  # any bit left in it sends the tile down the slow road
        for t in tl.static_range(4):
            i_row = i_group + t
            w_row = tl.load(p_w + i_segment * T + i_row, mask=i_row < T, other=0.0)
            a_row = row_address(p_rows, s_row, i_row, i_tensor, o_first, i_row < T, TABLE, D)
            a_row = tl.where(w_row != 0, a_row, 0)  # both are loaded at once: neither waits for the other
            low = low | (a_row & 15)
            a = a + (a_row,)
            w = w + (w_row,)
        if low == 0:
            x = ()
            for t in tl.static_range(4):
                x = x + (load_full(a[t], o, m_read, D),)
            for t in tl.static_range(4):
                acc += w[t] * x[t].to(ACC)
        else:
            for t in tl.static_range(4):
                acc += w[t] * load_part(a[t], o, n, m_read, D).to(ACC)
    return acc


@triton.jit
def zero_and_count(
    acc, units, state, o_start, n, block, p_count, GROUP: tl.constexpr, ONCE: tl.constexpr, D: tl.constexpr
):
    """``acc``, elements from ``o_start`` of a tile, 0 where a mask drops; what it keeps of a masked tile is counted."""
    # Written twice, drawn once. Where loads are predicated on the mask, the compiler finds this to be the same as for
    # them; where they are not, it drops that one, and no register holds the mask while rows are in flight.
    keep = kept(units, state, o_start, block, acc.shape[0], GROUP, ONCE, D)
    first_unit, _, _ = units
    if first_unit >= 0:
        m_tile = o_start + tl.arange(0, acc.shape[0]) < n
        tl.atomic_add(p_count, tl.sum((keep & m_tile).to(tl.int32), 0).to(tl.int64), sem="relaxed")
    return tl.where(keep, acc, 0.0)


@kernel
def combine_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_w,
    p_out,
    s_out: tl.int64,
    T: tl.int64,
    p_units,
    p_state,
    block,
    p_count,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one tile, which is one block."""
    tl.static_assert(BLOCK == TILE)
    i_tile = tl.program_id(0).to(tl.int64)
    tile = load_tile(p_tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    state = load_state(p_state, GROUP)
    units = load_units(p_units, i_tile, state, GROUP, ONCE)
    o = tl.arange(0, BLOCK)
    m_read = to_read(kept(units, state, 0, block, BLOCK, GROUP, ONCE, D), GROUP)
    acc = weighted_sum(p_rows, s_row, p_w, T, tile, o, m_read, TABLE, D, ACC, TILE)
    if GROUP != DENSE:
        acc = zero_and_count(acc, units, state, 0, n, block, p_count, GROUP, ONCE, D)
    a_out = row_address(p_out, s_out, 0, i_tensor, o_first, True, TABLE_OUT, D)
    store_row(a_out, o, n, acc, ((n ^ TILE) | (a_out & 15)) == 0, D)


def combine(
    rows: Rows, tiles: Tensor, tile: int, mask: Mask | None, w: Tensor, out: Rows, count: Tensor | None
) -> Launch:
    """Fill the one row of ``out``; ``w`` (S, T) is in the arithmetic dtype of the rows, contiguous.

    With a mask, ``count``, int64 of one number, grows by how many elements of masked tiles are kept.
    """
    setting = combine_setting()
    arguments = {
        "p_tiles": tiles,
        "p_w": w,
        "p_out": out.source,
        "p_count": count,
        "s_out": out.stride,
        "T": rows.count,
        "TABLE_OUT": out.table,
        "TILE": tile,
        "BLOCK": setting.BLOCK,
        **row_arguments(rows),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(combine_kernel, (len(tiles),), arguments, setting.threads, fp_fusion=True)
