"""The rows of J as a kernel sees them: T addresses for each tile, loaded and stored from there.

A row is one task's gradient. A tile of it (at most ``TILE`` consecutive elements of one tensor) starts at

    a = address of (row, tensor) + first element * itemsize

where the address comes from a table in device memory (gradients left where autograd put them; 0: this row has no
such tensor) or, for a matrix, is computed from the row stride. From there on the two are the same: kernels work on
raw addresses. A tile takes one of two roads, tested in the kernel for all its rows at once:

- full length and every address a multiple of 16: unmasked 128-bit loads, but for the missing rows;
- otherwise: masked loads of single elements.

Where a tensor starts is thus looked at when the kernel runs, and none is compiled for an alignment (``launch.kernel``).
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
"""What the cache is told of loads and stores by default. Triton 3.6 compiles no default that is a plain string."""


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


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What rows of ``dtype`` are computed in: float64 in itself, all others in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_arguments(rows: Rows) -> dict[str, Any]:
    """The arguments by which every kernel knows the rows it reads."""
    return {
        "p_rows": rows.source,
        "s_row": rows.stride,
        "TABLE": rows.table,
        "D": TRITON_DTYPE[rows.dtype],
        "ACC": TRITON_DTYPE[arithmetic(rows.dtype)],
    }


@triton.jit
def load_tile(p_tiles, i_tile):
    """(tensor, first element, number of elements, segment) of a tile; all int64 but the number, which is small."""
    p = p_tiles + 4 * i_tile
    return tl.load(p), tl.load(p + 1), tl.load(p + 2).to(tl.int32), tl.load(p + 3)


@triton.jit
def row_address(p_rows, s_row, i_row, i_tensor, o_first, m_row, TABLE: tl.constexpr, D: tl.constexpr):
    """Where row ``i_row`` has this tile, 0 if it has no such tensor or is masked out. ``i_row`` may be a vector."""
    o_bytes = o_first * (D.primitive_bitwidth // 8)
    o_row = i_row * tl.cast(s_row, tl.int64)
    if TABLE:
        a = tl.load(p_rows + o_row + i_tensor, mask=m_row, other=0)
    else:
        a = tl.where(m_row, p_rows.to(tl.int64) + o_row * (D.primitive_bitwidth // 8), 0)
    return tl.where(a == 0, a, a + o_bytes)


@triton.jit
def load_full(a, o, m_read, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Elements ``o`` from the 16-byte-aligned address ``a``, in 128-bit loads.

    Zeros from address 0, and without ``m_read``, where nothing is read. The compiler believes the hint only where it
    follows the cast. ``EVICT`` is what the cache is told: "evict_first" of what nobody reads again.
    """
    p = tl.multiple_of(a.to(tl.pointer_type(D)), 16)
    return tl.load(p + o, mask=(a != 0) & m_read, other=0.0, eviction_policy=EVICT)


@triton.jit
def load_part(a, o, n, m_read, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Elements ``o`` below ``n`` from any address ``a``, zeros beyond, from address 0 and without ``m_read``."""
    m = (o < n) & (a != 0) & m_read
    return tl.load(a.to(tl.pointer_type(D)) + o, mask=m, other=0.0, eviction_policy=EVICT)


@triton.jit
def store_row(a, o, n, x, m_full, D: tl.constexpr, EVICT: tl.constexpr = NO_HINT):
    """Write ``x`` to the elements ``o`` below ``n`` from address ``a``, in ``D``; ``m_full`` picks the road."""
    if m_full:
        tl.store(tl.multiple_of(a.to(tl.pointer_type(D)), 16) + o, x.to(D), eviction_policy=EVICT)
    else:
        tl.store(a.to(tl.pointer_type(D)) + o, x.to(D), mask=o < n, eviction_policy=EVICT)
