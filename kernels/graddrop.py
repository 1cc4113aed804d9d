"""GradDrop (Chen et al. 2020, "Just Pick a Sign"), one read of the rows and one write.

    out[e] = sum of J[t, e] over the tasks t whose J[t, e] has the sign that is chosen for e
    positive is chosen where coin(e) (P + N) < P      P the sum of the positive J[t, e], N that of the negative -J[t, e]

A program owns a tile and takes a block of it at a time. It keeps a sum for each sign, with coefficients two more, and
chooses when all rows are read: so no row is read twice, and no mask is stored. The coin is 24 bits of a word of Philox,
of which neighbours take the four words. P and N are added up row by row, without a product that could be rounded
together with a sum, and so have the bits of every other back end.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .combine import zero_and_count
from .launch import Launch, kernel
from .masks import (
    DENSE,
    KernelMask,
    Mask,
    draw_words,
    kept_elements,
    load_state,
    load_units,
    mask_arguments,
    to_read,
)
from .rows import (
    KernelRows,
    KernelTiles,
    Rows,
    Tiles,
    load_quad,
    load_tile,
    row_address,
    row_arguments,
    store_row,
    tile_arguments,
)
from .settings import graddrop_setting


class Coins(NamedTuple):
    """The random numbers of the entries."""

    positions: Tensor
    """(n_tiles, 2) int64: the position of a tile's first element, a multiple of 4; and a number that is not read."""
    stream: Tensor
    """(2,) int64: seed and step, by their bits."""


class KernelCoins(NamedTuple):
    """The bundle of ``Coins`` inside the kernel."""

    p_positions: Any
    p_stream: Any


@triton.jit
def coins_of(coins, i_tile, o_start, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The coins of the BLOCK elements from ``o_start`` of a tile."""
    first = tl.load(coins.p_positions + 2 * i_tile) + o_start
    counter = (first >> 2) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = draw_words(counter, tl.load(coins.p_stream), tl.load(coins.p_stream + 1))
    # The last join varies fastest: words 0, 1, 2, 3 in turn.
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    return (word >> 8).to(tl.int32).to(ACC) * 5.9604644775390625e-8  # 2^-24


@triton.jit
def sums_of_signs(rows, tile, p_coefficients, T, o, m_read, TILE: tl.constexpr):
    """P, -N, and the results where positive and where negative elements are chosen."""
    above = tl.zeros(o.shape, rows.ACC)
    below = tl.zeros(o.shape, rows.ACC)
    of_above = tl.zeros(o.shape, rows.ACC)
    of_below = tl.zeros(o.shape, rows.ACC)
    for i_quad in range(0, T, 4):
        quad = load_quad(rows, tile, i_quad, T, o, m_read, TILE)
        for t in tl.static_range(4):
            x = quad[t]
            if p_coefficients is None:
                above += tl.where(x < 0, 0.0, x)
                below += tl.where(x > 0, 0.0, x)
            else:
                m = i_quad + t < T
                chosen = tl.load(p_coefficients + i_quad + t, mask=m, other=0.0)
                other = tl.load(p_coefficients + T + i_quad + t, mask=m, other=0.0)
                x = tl.where(chosen != 0, x, tl.where(x - x == 0, x, 0.0))
                up = tl.where(x < 0, 0.0, x)
                down = tl.where(x > 0, 0.0, x)
                above += up
                below += down
                of_above += chosen * up + other * down
                of_below += chosen * down + other * up
    if p_coefficients is None:
        of_above = above
        of_below = below
    return above, below, of_above, of_below


@triton.jit
def drop_tile(rows, tiles, mask, coins, coefficients, out, p_kept):
    """Combine the program's tile; ``coefficients`` is a pointer, and T."""
    p_coefficients, T = coefficients
    i_tile = tl.program_id(0).to(tl.int64)
    tile = load_tile(tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    state = load_state(mask)
    units = load_units(mask, state, i_tile)
    a_out = row_address(out, 0, i_tensor, o_first, True)
    m_full = ((n ^ tiles.TILE) | (a_out & 15)) == 0
    for o_start in range(0, n, tiles.BLOCK):
        o = o_start + tl.arange(0, tiles.BLOCK)
        m_read = to_read(mask, kept_elements(mask, state, units, o_start, tiles.BLOCK))
        above, below, of_above, of_below = sums_of_signs(rows, tile, p_coefficients, T, o, m_read, tiles.TILE)
        size = above - below
        coin = coins_of(coins, i_tile, o_start, tiles.BLOCK, rows.ACC)
        g = tl.where(coin * size < above, of_above, of_below)
        g += size - size  # NaN where it is not finite
        if mask.SHARE != DENSE:
            g = zero_and_count(g, mask, state, units, o_start, n, p_kept)
        store_row(a_out, o, n, g, m_full, out.D)


@kernel
def graddrop_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_positions,
    p_stream,
    p_coefficients,
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
    """One program: one tile."""
    drop_tile(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        KernelCoins(p_positions, p_stream),
        (p_coefficients, T),
        KernelRows(p_out, s_out, TABLE_OUT, D, ACC),
        p_kept,
    )


def graddrop(
    rows: Rows,
    tiles: Tiles,
    mask: Mask | None,
    coins: Coins,
    coefficients: Tensor | None,
    out: Rows,
    kept: Tensor | None,
) -> Launch:
    """Fill the one row of ``out``.

    ``coefficients`` (2, T), in the arithmetic dtype of the rows, contiguous, multiply what is chosen and what is not;
    None for ones and zeros. With a mask, ``kept`` grows as in ``combine``.
    """
    setting = graddrop_setting(rows.dtype.itemsize)
    arguments = {
        "p_positions": coins.positions,
        "p_stream": coins.stream,
        "p_coefficients": coefficients,
        "p_out": out.source,
        "p_kept": kept,
        "s_out": out.stride,
        "T": rows.count,
        "TABLE_OUT": out.table,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(graddrop_kernel, (len(tiles.table),), arguments, setting.threads, fp_fusion=True)
