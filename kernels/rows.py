"""The rows of J inside a kernel: T addresses for each tile, loaded and stored from there.

A row is one task's gradient. A tile of it (at most ``TILE`` consecutive elements of one tensor) starts at

    a = address of (row, tensor) + first element * itemsize

The address comes from a table in device memory (gradients left where autograd put them; 0: this row has no such
tensor). For a matrix it is computed from the row stride. From there on the two are the same: kernels work on raw
addresses. A tile takes one of two roads, tested in the kernel for all its rows at once:

- full length and every address a multiple of 16: unmasked 128-bit loads, but for the missing rows;
- otherwise: masked loads of single elements.

The kernel looks at where a tensor starts when it runs. No kernel is compiled for an alignment (``launch.kernel``).

A kernel is launched with single arguments, since integers inside a tuple would lose the types written beside them. It
hands them on to its functions in bundles (``KernelRows``, ``KernelTiles``, ``masks.KernelMask``), and makes a bundle
inside of the call: Triton turns the constants of a tuple that is assigned to a name into numbers of the running kernel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPE = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


NO_HINT = tl.constexpr("")
"""Loads and stores tell the cache nothing by default. Triton 3.6 compiles no default that is a plain string."""


class Rows(NamedTuple):
    """Rows in device memory, behind a table of addresses or as a matrix of unit column stride."""

    source: Tensor
    """The matrix, or the int64 table of addresses: T n of T rows of n tensors, 0 where one is missing."""
    stride: int
    """From one row to the next in ``source``, in elements of it."""
    count: int
    """Number of rows, T."""
    dtype: torch.dtype
    """Of the rows."""
    table: bool
    """Whether ``source`` is a table of addresses."""


class Tiles(NamedTuple):
    """The tiles that rows are cut into, in device memory."""

    table: Tensor
    """(n_tiles, 4) int64: the tensor of a tile, its first element there, its number of elements, and its segment."""
    length: int
    """Elements of a whole tile."""


class KernelRows(NamedTuple):
    """The bundle of ``Rows`` inside a kernel."""

    p: Any
    stride: Any
    TABLE: tl.constexpr
    D: tl.constexpr
    ACC: tl.constexpr


class KernelTiles(NamedTuple):
    """The bundle of ``Tiles`` inside a kernel, with the elements that one step of a streaming loop takes, BLOCK."""

    p: Any
    TILE: tl.constexpr
    BLOCK: tl.constexpr


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which rows of ``dtype`` are computed: float64 in itself, all others in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_arguments(rows: Rows) -> dict[str, Any]:
    """Return the arguments that describe the rows a kernel reads."""
    return {
        "p_rows": rows.source,
        "s_row": rows.stride,
        "TABLE": rows.table,
        "D": TRITON_DTYPE[rows.dtype],
        "ACC": TRITON_DTYPE[arithmetic(rows.dtype)],
    }


def tile_arguments(tiles: Tiles, block: int) -> dict[str, Any]:
    """Return the arguments that describe the tiles, of which a kernel takes ``block`` elements a step."""
    return {"p_tiles": tiles.table, "TILE": tiles.length, "BLOCK": block}


def n_blocks(tiles: Tiles, block: int) -> int:
    """Return how many programs take one block each."""
    return len(tiles.table) * (tiles.length // block)


@triton.jit
def program_block(tiles):
    """(tile, first element in it) of the block that is this program's; those of a tile belong to neighbours."""
    BLOCKS: tl.constexpr = tiles.TILE // tiles.BLOCK
    i_block = tl.program_id(0).to(tl.int64)
    return i_block // BLOCKS, (i_block % BLOCKS).to(tl.int32) * tiles.BLOCK


@triton.jit
def load_tile(tiles, i_tile):
    """(tensor, first element, number of elements, segment) of a tile; all int64 but the number, which is small."""
    p = tiles.p + 4 * i_tile
    return tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int32), tl.load(p + 3)


@triton.jit
def row_address(rows, i_row, i_tensor, o_first, m_row):
    """Address of element ``o_first`` of a tensor of row ``i_row``, which may be a vector.

    0 if the row has no such tensor or is masked out.
    """
    o_bytes = o_first * (rows.D.primitive_bitwidth // 8)
    o_row = i_row * tl.cast(rows.stride, tl.int64)
    if rows.TABLE:
        a = tl.load(rows.p + o_row + i_tensor, mask=m_row, other=0)
    else:
        a = tl.where(m_row, rows.p.to(tl.int64) + o_row * (rows.D.primitive_bitwidth // 8), 0)
    return tl.where(a == 0, a, a + o_bytes)


@triton.jit
def load_full(a, o, m_read, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Elements ``o`` from the 16-byte-aligned address ``a``, in 128-bit loads.

    Zeros from address 0, and without ``m_read``, where nothing is read. The compiler believes the hint only where it
    follows the cast. ``EVICT`` tells the cache what to do: "evict_first" with data that nobody reads again.
    """
    p = tl.multiple_of(a.to(tl.pointer_type(D)), 16)
    return tl.load(p + o, mask=(a != 0) & m_read, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_part(a, o, n, m_read, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Elements ``o`` below ``n`` from any address ``a``, zeros beyond, from address 0 and without ``m_read``."""
    m = (o < n) & (a != 0) & m_read
    return tl.load(a.to(tl.pointer_type(D)) + o, mask=m, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_quad(rows, tile, i_row, T, o, m_read, TILE: tl.constexpr):
    """Elements ``o`` of the four rows from ``i_row`` on, of which T are there, in arithmetic dtype; zeros elsewhere.

    All four are in flight together.
    """
    i_tensor, o_first, n, _i_segment = tile
    a0 = row_address(rows, i_row, i_tensor, o_first, i_row < T)
    a1 = row_address(rows, i_row + 1, i_tensor, o_first, i_row + 1 < T)
    a2 = row_address(rows, i_row + 2, i_tensor, o_first, i_row + 2 < T)
    a3 = row_address(rows, i_row + 3, i_tensor, o_first, i_row + 3 < T)
    if ((n ^ TILE) | ((a0 | a1 | a2 | a3) & 15)) == 0:
        x0 = load_full(a0, o, m_read, rows.D)
        x1 = load_full(a1, o, m_read, rows.D)
        x2 = load_full(a2, o, m_read, rows.D)
        x3 = load_full(a3, o, m_read, rows.D)
    else:
        x0 = load_part(a0, o, n, m_read, rows.D)
        x1 = load_part(a1, o, n, m_read, rows.D)
        x2 = load_part(a2, o, n, m_read, rows.D)
        x3 = load_part(a3, o, n, m_read, rows.D)
    return x0.to(rows.ACC), x1.to(rows.ACC), x2.to(rows.ACC), x3.to(rows.ACC)


@triton.jit
def store_row(a, o, n, x, m_full, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Write ``x`` to the elements ``o`` below ``n`` from address ``a``, in ``D``; ``m_full`` picks the road."""
    if m_full:
        tl.store(tl.multiple_of(a.to(tl.pointer_type(D)), 16) + o, x.to(D), eviction_policy=EVICT)
    else:
        tl.store(a.to(tl.pointer_type(D)) + o, x.to(D), mask=o < n, eviction_policy=EVICT)
