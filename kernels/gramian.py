"""Gramian, first stage: sums of products of pieces. Here the form for few rows; more go to ``gramian_dot.py``.

    M[i, j] = sum_e J[i, e] * J[j, e]

Each program streams the tiles of one piece once and keeps one accumulator for each of the T (T + 1) / 2 pairs. An
accumulator is a block of BLOCK / V numbers: a thread sums the V products of its own 128 bits first, and the threads
meet only once, at the end. Elements that a mask drops (``masks.py``) count as zero. The sums of piece c are row c of
the partials, pair (i, j) with j <= i in column i (i + 1) / 2 + j; ``reduce.py`` adds the rows up in a fixed order.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .gramian_dot import Target, gramian_dot
from .launch import Launch, kernel
from .masks import KernelMask, Mask, kept_elements, load_state, load_units, mask_arguments, to_read, zero_dropped
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
    tile_arguments,
)
from .served import setting_for
from .settings import DotSetting

__all__ = ["Target", "gramian"]


@triton.jit
def add_products(acc, x, T: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr):
    """Accumulators plus the products of the rows ``x``, pair by pair."""
    new = ()
    for i in tl.static_range(T):
        for j in tl.static_range(i + 1):
            product = tl.sum(tl.reshape(x[i] * x[j], (BLOCK // V, V)), 1)
            new = new + (acc[i * (i + 1) // 2 + j] + product,)
    return new


@triton.jit
def sum_products(rows, tiles, mask, piece, T: tl.constexpr, V: tl.constexpr):
    """The accumulators of all pairs over a ``piece``: its first tile and its number of tiles."""
    i_first, n_tiles = piece
    o_block = tl.arange(0, tiles.BLOCK)
    state = load_state(mask)

    acc = ()
    for _i_pair in tl.static_range(T * (T + 1) // 2):
        acc = acc + (tl.zeros((tiles.BLOCK // V,), rows.ACC),)

    for i_tile in range(i_first, i_first + n_tiles):
        i_tensor, o_first, n, _i_segment = load_tile(tiles, i_tile)
        units = load_units(mask, state, i_tile)
        a = ()
        misfit = n ^ tiles.TILE  # 0 if the tile is full and its addresses aligned: 128-bit loads
        for t in tl.static_range(T):
            a_row = row_address(rows, t, i_tensor, o_first, True)
            misfit = misfit | (a_row & 15)
            a = a + (a_row,)
        if misfit == 0:
            for o in range(0, tiles.TILE, tiles.BLOCK):
                keep = kept_elements(mask, state, units, o, tiles.BLOCK)
                x = ()
                for t in tl.static_range(T):
                    x_row = load_full(a[t], o + o_block, to_read(mask, keep), rows.D)
                    x = x + (zero_dropped(mask, keep, x_row).to(rows.ACC),)
                acc = add_products(acc, x, T, tiles.BLOCK, V)
        else:
            for o in range(0, n, tiles.BLOCK):
                keep = kept_elements(mask, state, units, o, tiles.BLOCK)
                x = ()
                for t in tl.static_range(T):
                    x = x + (load_part(a[t], o + o_block, n, keep, rows.D).to(rows.ACC),)
                acc = add_products(acc, x, T, tiles.BLOCK, V)
    return acc


@kernel
def gramian_kernel(
    p_tiles,
    p_pieces,
    p_rows,
    s_row: tl.int64,
    p_partials,
    p_units,
    p_state,
    block,
    T: tl.constexpr,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    V: tl.constexpr,
    SHARE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one piece."""
    PAIRS: tl.constexpr = T * (T + 1) // 2
    i_piece = tl.program_id(0).to(tl.int64)
    acc = sum_products(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        (tl.load(p_pieces + 2 * i_piece), tl.load(p_pieces + 2 * i_piece + 1)),
        T,
        V,
    )
    for i_pair in tl.static_range(PAIRS):
        tl.store(p_partials + i_piece * PAIRS + i_pair, tl.sum(acc[i_pair]))


def gramian(rows: Rows, tiles: Tiles, mask: Mask | None, pieces: Tensor, partials: Tensor, target: Target) -> Launch:
    """Fill ``partials`` (pieces, pairs), in the arithmetic dtype of the rows, in whichever form suits their number.

    ``target`` concerns :func:`gramian_dot` alone.
    """
    setting = setting_for("gramian", rows)
    if isinstance(setting, DotSetting):
        return gramian_dot(rows, tiles, mask, pieces, partials, target)
    arguments = {
        "p_pieces": pieces,
        "p_partials": partials,
        "T": rows.count,
        "V": setting.V,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(gramian_kernel, (len(pieces),), arguments, setting.threads, fp_fusion=True)
