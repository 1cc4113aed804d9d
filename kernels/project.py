"""Matrix product of a small W with the rows: the projected gradients themselves.

    out[r, e] = sum_t W[s, r, t] * J[t, e]      s the segment of e

A plain product: 0 times NaN is NaN here. A program owns a tile and up to eight output rows, each with its own
accumulator, so up to eight rows cost one read of J. T is a run-time value, walked in quads of rows.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .rows import (
    KernelRows,
    KernelTiles,
    Rows,
    Tiles,
    load_full,
    load_part,
    load_tile,
    row_address,
    row_arguments,
    store_row,
    tile_arguments,
)
from .served import setting_for
from .settings import OUTPUT_ROWS


@triton.jit
def add_row(acc, x, W, i_out, i_row, ROWS: tl.constexpr):
    """Accumulators plus row ``i_row`` of J, each with its own weight; ``W`` is a pointer, R and T."""
    p_W, R, T = W
    new = ()
    for r in tl.static_range(ROWS):
        i_r = i_out + r
        w = tl.load(p_W + i_r * T + i_row, mask=(i_r < R) & (i_row < T), other=0.0)
        new = new + (acc[r] + w * x,)
    return new


@triton.jit
def project_tile(rows, tiles, W, out, ROWS: tl.constexpr):
    """Compute ROWS output rows of the program's tile."""
    i_tensor, o_first, n, i_segment = load_tile(tiles, tl.program_id(0).to(tl.int64))
    i_out = tl.program_id(1).to(tl.int64) * ROWS
    p_W, R, T = W
    p_W += i_segment * R * T
    for o_start in range(0, n, tiles.BLOCK):
        o = o_start + tl.arange(0, tiles.BLOCK)
        acc = ()
        for _r in tl.static_range(ROWS):
            acc = acc + (tl.zeros((tiles.BLOCK,), rows.ACC),)
        for i_quad in range(0, T, 4):
            a = ()
            misfit = n ^ tiles.TILE  # 0 if the tile is full and its addresses aligned: 128-bit loads
            for t in tl.static_range(4):
                i_row = i_quad + t
                a_row = row_address(rows, i_row, i_tensor, o_first, i_row < T)
                misfit = misfit | (a_row & 15)
                a = a + (a_row,)
            if misfit == 0:
                x = ()
                for t in tl.static_range(4):
                    x = x + (load_full(a[t], o, True, rows.D),)
                for t in tl.static_range(4):
                    acc = add_row(acc, x[t].to(rows.ACC), (p_W, R, T), i_out, i_quad + t, ROWS)
            else:
                for t in tl.static_range(4):
                    x_row = load_part(a[t], o, n, True, rows.D).to(rows.ACC)
                    acc = add_row(acc, x_row, (p_W, R, T), i_out, i_quad + t, ROWS)
        for r in tl.static_range(ROWS):
            i_r = i_out + r
            if i_r < R:
                a_out = row_address(out, i_r, i_tensor, o_first, True)
                store_row(a_out, o, n, acc[r], ((n ^ tiles.TILE) | (a_out & 15)) == 0, out.D)


@kernel
def project_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_W,
    p_out,
    s_out: tl.int64,
    R: tl.int64,
    T: tl.int64,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: one tile, ROWS output rows."""
    project_tile(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        (p_W, R, T),
        KernelRows(p_out, s_out, TABLE_OUT, D, ACC),
        ROWS,
    )


def project(rows: Rows, tiles: Tiles, W: Tensor, out: Rows) -> Launch:
    """Fill the R rows of ``out``; ``W`` (S, R, T) is in the arithmetic dtype of the rows, contiguous."""
    setting = setting_for("project", rows)
    n_rows = min(OUTPUT_ROWS, triton.next_power_of_2(out.count))
    arguments = {
        "p_W": W,
        "p_out": out.source,
        "s_out": out.stride,
        "R": out.count,
        "T": rows.count,
        "TABLE_OUT": out.table,
        "ROWS": n_rows,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
    }
    grid = len(tiles.table), triton.cdiv(out.count, n_rows)
    return Launch(project_kernel, grid, arguments, setting.threads, fp_fusion=True)
