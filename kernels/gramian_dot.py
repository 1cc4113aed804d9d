"""Gramian of up to 64 rows on ``tl.dot``, first stage: sums of products of pieces.

    M = sum over blocks of columns X (rows x BLOCK) of X Xᵀ

Writes the same partials as ``gramian.py``. 16-bit rows feed the tensor cores as stored and are summed in float32.
float64 rows are multiplied as they are, and so are float32 rows on AMD's GPUs. NVIDIA's tensor cores take eleven bits
of a float32 number (tf32), so each is split in two:

    x = hi + lo,  hi rounded to nearest;  N = hi hiᵀ + 2 hi loᵀ;  M = (N + Nᵀ) / 2

which drops only lo loᵀ, 2⁻²⁴ of the product. Tensor cores round sums toward zero, so a chain of sums is ended every
CHAIN elements and added to an outer sum that rounds to nearest.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .masks import DENSE, KernelMask, Mask, kept_elements, load_state, load_units, mask_arguments, to_read, zero_dropped
from .rows import KernelRows, KernelTiles, Rows, Tiles, load_tile, row_address, row_arguments, tile_arguments
from .served import setting_for


class Target(NamedTuple):
    """The properties of a device that decide how products are taken."""

    tensor_cores: bool
    """The device has NVIDIA's tensor cores, which take tf32."""
    interpreted: bool
    """16-bit rows are upcast before the product, since the interpreter keeps bfloat16 as integers and would multiply
    those."""


class KernelDot(NamedTuple):
    """The bundle of constants of this form inside the kernel: a ``DotSetting``, and how products are taken."""

    ROWS: tl.constexpr
    CHAIN: tl.constexpr
    SPLIT: tl.constexpr
    UPCAST: tl.constexpr


@triton.jit
def load_rows_full(a, o, m_read, D: tl.constexpr):
    """``rows.load_full`` for a vector of addresses."""
    p = tl.multiple_of(a.to(tl.pointer_type(D)), 16)
    return tl.load(p[:, None] + o[None, :], mask=(a != 0)[:, None] & m_read, other=0.0)


@triton.jit
def load_rows_part(a, o, n, m_read, D: tl.constexpr):
    """``rows.load_part`` for a vector of addresses."""
    p = a.to(tl.pointer_type(D))
    return tl.load(p[:, None] + o[None, :], mask=(a != 0)[:, None] & (o < n)[None, :] & m_read, other=0.0)


@triton.jit
def kept_columns(mask, state, units, o_start, BLOCK: tl.constexpr):
    """``masks.kept_elements`` for a block of rows, which all have the same mask."""
    keep = kept_elements(mask, state, units, o_start, BLOCK)
    if mask.SHARE == DENSE:
        return keep
    else:
        return keep[None, :]


@triton.jit
def add_dot(acc, x, SPLIT: tl.constexpr, UPCAST: tl.constexpr, ACC: tl.constexpr):
    """``acc`` plus x xᵀ, or plus the N of the split."""
    if SPLIT:
        bits = x.to(tl.int32, bitcast=True)
        hi = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        lo = x - hi
        # N = hi hiᵀ + 2 hi loᵀ
        acc = tl.dot(hi, tl.trans(hi), acc, input_precision="tf32")
        return tl.dot(hi, tl.trans(2 * lo), acc, input_precision="tf32")
    else:
        if UPCAST:
            x = x.to(ACC)
        return tl.dot(x, tl.trans(x), acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def sum_dots(rows, tiles, mask, piece, T, form):
    """(ROWS, ROWS), the sum of all products over a ``piece``: its first tile and its number of tiles."""
    i_first, n_tiles = piece
    i_row = tl.arange(0, form.ROWS)
    o_block = tl.arange(0, tiles.BLOCK)
    state = load_state(mask)

    total = tl.zeros((form.ROWS, form.ROWS), rows.ACC)
    for i_tile in range(i_first, i_first + n_tiles):
        i_tensor, o_first, n, _i_segment = load_tile(tiles, i_tile)
        units = load_units(mask, state, i_tile)
        a = row_address(rows, i_row.to(tl.int64), i_tensor, o_first, i_row < T)
        misaligned = tl.max(a & 15, 0)
        if (n == tiles.TILE) & (misaligned == 0):
            for o_chain in range(0, tiles.TILE, form.CHAIN):
                acc = tl.zeros((form.ROWS, form.ROWS), rows.ACC)
                for o in range(o_chain, o_chain + form.CHAIN, tiles.BLOCK):
                    keep = kept_columns(mask, state, units, o, tiles.BLOCK)
                    x = load_rows_full(a, o + o_block, to_read(mask, keep), rows.D)
                    acc = add_dot(acc, zero_dropped(mask, keep, x), form.SPLIT, form.UPCAST, rows.ACC)
                total += acc
        else:
            for o_chain in range(0, n, form.CHAIN):
                acc = tl.zeros((form.ROWS, form.ROWS), rows.ACC)
                for o in range(o_chain, o_chain + form.CHAIN, tiles.BLOCK):
                    keep = kept_columns(mask, state, units, o, tiles.BLOCK)
                    x = load_rows_part(a, o + o_block, n, keep, rows.D)
                    acc = add_dot(acc, x, form.SPLIT, form.UPCAST, rows.ACC)
                total += acc

    if form.SPLIT:
        # M = (N + Nᵀ) / 2
        total = 0.5 * (total + tl.trans(total))
    return total


@kernel
def gramian_dot_kernel(
    p_tiles,
    p_pieces,
    p_rows,
    s_row: tl.int64,
    p_partials,
    T: tl.int64,
    p_units,
    p_state,
    block,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    SHARE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one piece."""
    i_piece = tl.program_id(0).to(tl.int64)
    total = sum_dots(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        (tl.load(p_pieces + 2 * i_piece), tl.load(p_pieces + 2 * i_piece + 1)),
        T,
        KernelDot(ROWS, CHAIN, SPLIT, UPCAST),
    )
    i_row = tl.arange(0, ROWS)
    i = i_row[:, None]
    j = i_row[None, :]
    n_pairs = T * (T + 1) // 2
    tl.store(p_partials + i_piece * n_pairs + i * (i + 1) // 2 + j, total, mask=(i < T) & (j <= i))


def gramian_dot(
    rows: Rows, tiles: Tiles, mask: Mask | None, pieces: Tensor, partials: Tensor, target: Target
) -> Launch:
    """Fill ``partials`` (pieces, pairs), in the arithmetic dtype of the rows."""
    setting = setting_for("gramian", rows)
    arguments = {
        "p_pieces": pieces,
        "p_partials": partials,
        "T": rows.count,
        "ROWS": setting.ROWS,
        "CHAIN": setting.CHAIN,
        "SPLIT": target.tensor_cores and rows.dtype.itemsize == 4,
        "UPCAST": target.interpreted,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(gramian_dot_kernel, (len(pieces),), arguments, setting.threads, fp_fusion=True)
