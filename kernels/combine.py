"""Weighted sum of the rows, one read and one write.

    out[e] = sum_t w[s, t] * J[t, e]      s the segment of e

A program owns a block of a tile. It walks the rows in quads, four rows whose loads are all in flight together, so the
number of rows is a run-time value and no T compiles a kernel of its own. A row of weight exactly 0 is not read, and its
values, NaN included, do not reach the result; neither is a missing row. Under a mask (``masks.py``) dropped elements
are exactly 0, and each program adds the number of elements it kept to one integer: exact in any order.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .masks import DENSE, KernelMask, Mask, kept_elements, load_state, load_units, mask_arguments, to_read
from .rows import (
    KernelRows,
    KernelTiles,
    Rows,
    Tiles,
    load_full,
    load_part,
    load_tile,
    n_blocks,
    program_block,
    row_address,
    row_arguments,
    store_row,
    tile_arguments,
)
from .served import setting_for


@triton.jit
def weighted_sum(rows, p_w, T, tile, o, m_read, TILE: tl.constexpr):
    """The sum of the rows' elements ``o`` of a ``tile``, zeros beyond its end and without ``m_read``."""
    i_tensor, o_first, n, i_segment = tile
    acc = tl.zeros(o.shape, rows.ACC)
    for i_quad in range(0, T, 4):
        a = ()
        w = ()
        misfit = n ^ TILE  # 0 if the tile is full and its addresses aligned: 128-bit loads
        for t in tl.static_range(4):
            i_row = i_quad + t
            w_row = tl.load(p_w + i_segment * T + i_row, mask=i_row < T, other=0.0)
            a_row = row_address(rows, i_row, i_tensor, o_first, i_row < T)
            a_row = tl.where(w_row != 0, a_row, 0)  # both are loaded at once: neither waits for the other
            misfit = misfit | (a_row & 15)
            a = a + (a_row,)
            w = w + (w_row,)
        if misfit == 0:
            x = ()
            for t in tl.static_range(4):
                x = x + (load_full(a[t], o, m_read, rows.D),)
            for t in tl.static_range(4):
                acc += w[t] * x[t].to(rows.ACC)
        else:
            for t in tl.static_range(4):
                acc += w[t] * load_part(a[t], o, n, m_read, rows.D).to(rows.ACC)
    return acc


@triton.jit
def zero_and_count(acc, mask, state, units, o_start, n, p_kept):
    """``acc``, elements from ``o_start`` of a tile, 0 where the mask drops; counts what it keeps of a masked tile."""
    # Written twice, drawn once. Where loads are predicated on the mask, the compiler finds this mask to be theirs.
    # Where they are not, it drops the other one, and no register holds the mask while rows are in flight.
    keep = kept_elements(mask, state, units, o_start, acc.shape[0])
    first_unit, _, _ = units
    if first_unit >= 0:
        m_tile = o_start + tl.arange(0, acc.shape[0]) < n
        tl.atomic_add(p_kept, tl.sum((keep & m_tile).to(tl.int32), 0).to(tl.int64), sem="relaxed")
    return tl.where(keep, acc, 0.0)


@triton.jit
def combine_block(rows, tiles, mask, p_w, T, out, p_kept):
    """Combine the program's block."""
    i_tile, o_start = program_block(tiles)
    tile = load_tile(tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    a_out = row_address(out, 0, i_tensor, o_first, True)  # before the rows: the store need not wait for it then
    if o_start < n:
        state = load_state(mask)
        units = load_units(mask, state, i_tile)
        o = o_start + tl.arange(0, tiles.BLOCK)
        m_read = to_read(mask, kept_elements(mask, state, units, o_start, tiles.BLOCK))
        acc = weighted_sum(rows, p_w, T, tile, o, m_read, tiles.TILE)
        if mask.SHARE != DENSE:
            acc = zero_and_count(acc, mask, state, units, o_start, n, p_kept)
        store_row(a_out, o, n, acc, ((n ^ tiles.TILE) | (a_out & 15)) == 0, out.D)


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
    p_kept,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one block."""
    combine_block(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        p_w,
        T,
        KernelRows(p_out, s_out, TABLE_OUT, D, ACC),
        p_kept,
    )


def combine(rows: Rows, tiles: Tiles, mask: Mask | None, w: Tensor, out: Rows, kept: Tensor | None) -> Launch:
    """Fill the one row of ``out``; ``w`` (S, T) is in the arithmetic dtype of the rows, contiguous.

    With a mask, ``kept``, int64 of one number, grows by how many elements of masked tiles are kept.
    """
    setting = setting_for("combine", rows)
    arguments = {
        "p_w": w,
        "p_out": out.source,
        "p_kept": kept,
        "s_out": out.stride,
        "T": rows.count,
        "TABLE_OUT": out.table,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(combine_kernel, (n_blocks(tiles, setting.BLOCK),), arguments, setting.threads, fp_fusion=True)
