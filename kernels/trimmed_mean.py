"""Trimmed mean (Yin et al. 2018), one read of the rows and one write.

    out[e] = mean of J[t, e] over the T - 2 k tasks t that are left if the k largest and the k smallest are left out

A program owns a tile and takes a block of it at a time. It keeps the k largest and the k smallest elements so far, in
order. A new element goes through the largest, and each comparison passes on the smaller one. What comes out goes
through the smallest alike. What then comes out has k elements above it and k below it, so it counts for good.
The first k elements fill the largest, and what the next k displace fills the smallest. So the elements that are left
out are in no sum, and however large they are, they round nothing off.

With weights each element carries its weighted value along, which is what is added up, and equals are told apart.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

import triton
import triton.language as tl
from torch import Tensor

from .combine import zero_and_count
from .launch import Launch, kernel
from .masks import DENSE, KernelMask, Mask, kept_elements, load_state, load_units, mask_arguments, to_read
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
from .settings import trimmed_mean_setting


@triton.jit
def sift(x, xs, m, DOWN: tl.constexpr, K: tl.constexpr):
    """(what ``x`` displaces from ``xs``, and the new ``xs``); nothing without ``m``.

    ``xs`` are K elements in descending order (DOWN), or in ascending order.
    """
    new_xs = ()
    for j in tl.static_range(K):
        old = xs[j]
        before = ((x > old) if DOWN else (x < old)) & m
        new_xs = new_xs + (tl.where(before, x, old),)
        x = tl.where(before, old, x)
    return x, new_xs


@triton.jit
def sift_weighted(x, v, xs, vs, m, new, DOWN: tl.constexpr, K: tl.constexpr):
    """The same of elements that carry ``v`` and ``vs``, where it matters which of equals is displaced.

    The earlier one of equals counts as the larger, and ``x`` is the latest of all where it is ``new``. Also returned is
    whether it still is.
    """
    new_xs = ()
    new_vs = ()
    first = new & (not DOWN)  # whether ``x`` comes before its equals
    for j in tl.static_range(K):
        old = xs[j]
        old_v = vs[j]
        before = (((x > old) if DOWN else (x < old)) | (first & (x == old))) & m
        new_xs = new_xs + (tl.where(before, x, old),)
        new_vs = new_vs + (tl.where(before, v, old_v),)
        x = tl.where(before, old, x)
        v = tl.where(before, old_v, v)
        first = first | before  # what is displaced comes before all that follow
        new = new & (before == 0)
    return x, v, new_xs, new_vs, new


@triton.jit
def trimmed_sum(rows, tile, p_weights, T, o, m_read, TILE: tl.constexpr, K: tl.constexpr):
    """The sum of the elements that are not left out; not a number where one of all is not finite."""
    total = tl.zeros(o.shape, rows.ACC)
    broken = tl.zeros(o.shape, rows.ACC)
    above = ()
    below = ()
    of_above = ()
    of_below = ()
    for _j in tl.static_range(K):
        above = above + (tl.full(o.shape, float("-inf"), rows.ACC),)
        below = below + (tl.full(o.shape, float("inf"), rows.ACC),)
        if p_weights is not None:
            of_above = of_above + (tl.zeros(o.shape, rows.ACC),)
            of_below = of_below + (tl.zeros(o.shape, rows.ACC),)
    for i_quad in range(0, T, 4):
        quad = load_quad(rows, tile, i_quad, T, o, m_read, TILE)
        for t in tl.static_range(4):
            i_row = i_quad + t
            m_row = i_row < T
            x = quad[t]
            # Before K elements are there, the next one displaces none.
            m_below = m_row & (i_row >= K)
            if p_weights is None:
                broken += x - x
                x, above = sift(x, above, m_row, True, K)
                x, below = sift(x, below, m_below, False, K)
            else:
                w = tl.load(p_weights + i_row, mask=m_row, other=0.0)
                x = tl.where(w != 0, x, tl.where(x - x == 0, x, 0.0))
                broken += x - x
                new = x == x
                x, v, above, of_above, new = sift_weighted(x, w * x, above, of_above, m_row, new, True, K)
                x, v, below, of_below, new = sift_weighted(x, v, below, of_below, m_below, new, False, K)
                x = v
            total += tl.where(m_row & (i_row >= 2 * K), x, 0.0)
    return total + broken


@triton.jit
def trim_tile(rows, tiles, mask, weights, out, p_kept, K: tl.constexpr):
    """Combine the program's tile; ``weights`` is a pointer, and T."""
    p_weights, T = weights
    i_tile = tl.program_id(0).to(tl.int64)
    tile = load_tile(tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    state = load_state(mask)
    units = load_units(mask, state, i_tile)
    a_out = row_address(out, 0, i_tensor, o_first, True)
    m_full = ((n ^ tiles.TILE) | (a_out & 15)) == 0
    left = (T - 2 * K).to(rows.ACC)
    for o_start in range(0, n, tiles.BLOCK):
        o = o_start + tl.arange(0, tiles.BLOCK)
        m_read = to_read(mask, kept_elements(mask, state, units, o_start, tiles.BLOCK))
        g = trimmed_sum(rows, tile, p_weights, T, o, m_read, tiles.TILE, K) / left
        if mask.SHARE != DENSE:
            g = zero_and_count(g, mask, state, units, o_start, n, p_kept)
        store_row(a_out, o, n, g, m_full, out.D)


@kernel
def trimmed_mean_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_weights,
    p_out,
    s_out: tl.int64,
    T: tl.int64,
    p_units,
    p_state,
    block,
    p_kept,
    K: tl.constexpr,
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
    trim_tile(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        (p_weights, T),
        KernelRows(p_out, s_out, TABLE_OUT, D, ACC),
        p_kept,
        K,
    )


def trimmed_mean(
    rows: Rows, tiles: Tiles, mask: Mask | None, k: int, weights: Tensor | None, out: Rows, kept: Tensor | None
) -> Launch:
    """Fill the one row of ``out``; ``rows`` are more than 2 ``k``.

    ``weights`` (T,), in the arithmetic dtype of the rows, contiguous, multiply what is left; None for ones. With a
    mask, ``kept`` grows as in ``combine``.
    """
    setting = trimmed_mean_setting(k, rows.dtype.itemsize)
    arguments = {
        "p_weights": weights,
        "p_out": out.source,
        "p_kept": kept,
        "s_out": out.stride,
        "T": rows.count,
        "K": k,
        "TABLE_OUT": out.table,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(trimmed_mean_kernel, (len(tiles.table),), arguments, setting.threads, fp_fusion=True)
