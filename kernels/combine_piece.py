"""A piece of the combination in the one launch (``surgery.py``): the formula of ``combine.py``, for few rows.

T is a constant, so that all rows of a block are in flight together. A program takes a block of the Gramian's size at a
time, because a whole tile takes more registers.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .masks import DENSE, kept_elements, load_state, load_units, to_read
from .rows import load_full, load_part, load_tile, row_address, store_row


class KernelWeights(NamedTuple):
    """Weights (n_segments, T) inside the kernel; tiles of any later segment are unshared, with weights of 1."""

    p: Any
    n_segments: Any
    T: tl.constexpr


@triton.jit
def combine_piece(rows, tiles, mask, item, weights, out, p_kept):
    """The weighted sum of an ``item``'s tiles, the last one first: that is still in the cache.

    An ``item`` is its first tile, its number of tiles and its segment.
    """
    i_first, n_tiles, i_segment = item
    T: tl.constexpr = weights.T
    BLOCK: tl.constexpr = tiles.BLOCK
    o_block = tl.arange(0, BLOCK)
    state = load_state(mask)
    n_kept = tl.zeros((BLOCK,), tl.int32)
    w = ()
    for t in tl.static_range(T):
        m_shared = i_segment < weights.n_segments
        w = w + (tl.load(weights.p + i_segment * T + t, mask=m_shared, other=1.0, cache_modifier=".cg"),)
    for i_back in range(n_tiles):
        i_tile = i_first + n_tiles - 1 - i_back
        i_tensor, o_first, n, _i_segment = load_tile(tiles, i_tile)
        units = load_units(mask, state, i_tile)
        a_out = row_address(out, 0, i_tensor, o_first, True)
        misfit = (n ^ tiles.TILE) | (a_out & 15)  # 0 if the tile is full and its addresses aligned: 128-bit loads
        a = ()
        for t in tl.static_range(T):
            a_row = row_address(rows, t, i_tensor, o_first, True)
            a_row = tl.where(w[t] != 0, a_row, 0)
            misfit = misfit | (a_row & 15)
            a = a + (a_row,)
        if misfit == 0:
            for o_start in range(0, tiles.TILE, BLOCK):
                keep = kept_elements(mask, state, units, o_start, BLOCK)
                o = o_start + o_block
                acc = tl.zeros((BLOCK,), rows.ACC)
                for t in tl.static_range(T):
                    acc += w[t] * load_full(a[t], o, to_read(mask, keep), rows.D, "evict_first").to(rows.ACC)
                if mask.SHARE != DENSE:
                    acc = tl.where(keep, acc, 0.0)
                    n_kept += (keep & (units[0] >= 0)).to(tl.int32)
                store_row(a_out, o, n, acc, True, out.D, "evict_first")
        else:
            for o_start in range(0, n, BLOCK):
                keep = kept_elements(mask, state, units, o_start, BLOCK)
                o = o_start + o_block
                acc = tl.zeros((BLOCK,), rows.ACC)
                for t in tl.static_range(T):
                    acc += w[t] * load_part(a[t], o, n, to_read(mask, keep), rows.D, "evict_first").to(rows.ACC)
                if mask.SHARE != DENSE:
                    acc = tl.where(keep, acc, 0.0)
                    n_kept += (keep & (units[0] >= 0) & (o < n)).to(tl.int32)
                store_row(a_out, o, n, acc, False, out.D, "evict_first")
    if mask.SHARE != DENSE:
        tl.atomic_add(p_kept, tl.sum(n_kept, 0).to(tl.int64), sem="relaxed")
