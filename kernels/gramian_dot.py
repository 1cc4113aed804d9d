"""Gramian of up to 64 rows on ``tl.dot``, first stage: sums of products of pieces.

    M = sum over blocks of columns X (rows x BLOCK) of X Xᵀ

Writes the same partials as ``gramian.py``. 16-bit rows feed the tensor cores as stored and are summed in float32;
float32 rows up to 32 are multiplied as they are; above that, where NVIDIA's tensor cores are needed to keep up with
memory, each number is split into two of the eleven bits that they take (tf32):

    x = hi + lo,  hi rounded to nearest;  N = hi hiᵀ + 2 hi loᵀ;  M = (N + Nᵀ) / 2

which drops only lo loᵀ, 2⁻²⁴ of the product. Tensor cores round sums toward zero, so a chain of sums is ended every
CHAIN elements and added to an outer sum that rounds to nearest.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .masks import DENSE, Mask, kept, load_state, load_units, mask_arguments, to_read, zero_dropped
from .rows import Rows, load_tile, row_address, row_arguments
from .settings import dot_setting


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
def kept_columns(
    units, state, o_start, block, BLOCK: tl.constexpr, GROUP: tl.constexpr, ONCE: tl.constexpr, D: tl.constexpr
):
    """``masks.kept`` for a block of rows, which all have the same mask."""
    keep = kept(units, state, o_start, block, BLOCK, GROUP, ONCE, D)
    if GROUP == DENSE:
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
    GROUP: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one piece."""
    i_piece = tl.program_id(0).to(tl.int64)
    i_first = tl.load(p_pieces + 2 * i_piece)
    n_tiles = tl.load(p_pieces + 2 * i_piece + 1)
    i_row = tl.arange(0, ROWS)
    o_block = tl.arange(0, BLOCK)
    state = load_state(p_state, GROUP)

    total = tl.zeros((ROWS, ROWS), ACC)
    for i_tile in range(i_first, i_first + n_tiles):
        i_tensor, o_first, n, _i_segment = load_tile(p_tiles, i_tile)
        units = load_units(p_units, i_tile, state, GROUP, ONCE)
        a = row_address(p_rows, s_row, i_row.to(tl.int64), i_tensor, o_first, i_row < T, TABLE, D)
        misaligned = tl.max(a & 15, 0)
        if (n == TILE) & (misaligned == 0):
            for o_chain in range(0, TILE, CHAIN):
                acc = tl.zeros((ROWS, ROWS), ACC)
                for o in range(o_chain, o_chain + CHAIN, BLOCK):
                    keep = kept_columns(units, state, o, block, BLOCK, GROUP, ONCE, D)
                    x = load_rows_full(a, o + o_block, to_read(keep, GROUP), D)
                    acc = add_dot(acc, zero_dropped(x, keep, GROUP), SPLIT, UPCAST, ACC)
                total += acc
        else:
            for o_chain in range(0, n, CHAIN):
                acc = tl.zeros((ROWS, ROWS), ACC)
                for o in range(o_chain, o_chain + CHAIN, BLOCK):
                    keep = kept_columns(units, state, o, block, BLOCK, GROUP, ONCE, D)
                    acc = add_dot(acc, load_rows_part(a, o + o_block, n, keep, D), SPLIT, UPCAST, ACC)
                total += acc

    if SPLIT:
        # M = (N + Nᵀ) / 2
        total = 0.5 * (total + tl.trans(total))
    i = i_row[:, None]
    j = i_row[None, :]
    n_pairs = T * (T + 1) // 2
    tl.store(p_partials + i_piece * n_pairs + i * (i + 1) // 2 + j, total, mask=(i < T) & (j <= i))


def gramian_dot(
    rows: Rows,
    tiles: Tensor,
    tile: int,
    mask: Mask | None,
    pieces: Tensor,
    partials: Tensor,
    tensor_cores: bool,
    interpreted: bool,
) -> Launch:
    """Fill ``partials`` (pieces, pairs), in the arithmetic dtype of the rows.

    ``tensor_cores``: the device has NVIDIA's, which take tf32. ``interpreted``: 16-bit rows are upcast before the
    product, since the interpreter keeps bfloat16 as integers and would multiply those.
    """
    setting = dot_setting(rows.count, rows.dtype.itemsize)
    arguments = {
        "p_tiles": tiles,
        "p_pieces": pieces,
        "p_partials": partials,
        "T": rows.count,
        "TILE": tile,
        "ROWS": setting.ROWS,
        "BLOCK": setting.BLOCK,
        "CHAIN": setting.CHAIN,
        "SPLIT": tensor_cores and rows.dtype.itemsize == 4 and setting.ROWS > 32,
        "UPCAST": interpreted,
        **row_arguments(rows),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(gramian_dot_kernel, (len(pieces),), arguments, setting.threads, fp_fusion=True)
