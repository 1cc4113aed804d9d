"""Single entries of the rows, by position in the tensors one after another: read for all rows, written for one.

    values[t, e] = J[t, index[e]]        out[index[e]] = values[e]

Which tensor a position falls into is found by bisection in the table of where the tensors start and end; from there on
the address is the row's table entry plus what is left. An entry costs a 32-byte sector, so ``index`` is ascending: what
neighbours share is read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .rows import Rows, row_address, row_arguments
from .settings import ENTRIES


@triton.jit
def find_tensor(p_bounds, n, position, m):
    """(tensor, element in it) of positions below ``p_bounds[n]``; a tensor without elements holds none."""
    low = tl.zeros_like(position)
    high = low + n
    # bounds[low] <= position < bounds[high], and bisection halves the distance, from n on
    while n > 1:
        middle = (low + high) // 2
        m_right = tl.load(p_bounds + middle, mask=m, other=0) <= position
        low = tl.where(m_right, middle, low)
        high = tl.where(m_right, high, middle)
        n = (n + 1) // 2
    return low, position - tl.load(p_bounds + low, mask=m, other=0)


@triton.jit
def find_entries(
    p_rows, s_row, i_row, p_bounds, n, p_index, d, TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """(which of the d positions are this program's, whether there are such, where row ``i_row`` has them, or 0)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < d
    i_tensor, o = find_tensor(p_bounds, n, tl.load(p_index + i, mask=m, other=0), m)
    return i, m, row_address(p_rows, s_row, i_row, i_tensor, o, m, TABLE, D)


@kernel
def gather_kernel(
    p_rows,
    s_row: tl.int64,
    p_bounds,
    n: tl.int64,
    p_index,
    d: tl.int64,
    p_values,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK positions, one row."""
    i_row = tl.program_id(1).to(tl.int64)
    i, m, a = find_entries(p_rows, s_row, i_row, p_bounds, n, p_index, d, TABLE, D, BLOCK)
    x = tl.load(a.to(tl.pointer_type(D)), mask=a != 0, other=0.0)
    tl.store(p_values + i_row * d + i, x.to(ACC), mask=m)


@kernel
def scatter_kernel(
    p_rows,
    s_row: tl.int64,
    p_bounds,
    n: tl.int64,
    p_index,
    d: tl.int64,
    p_values,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK positions."""
    i, m, a = find_entries(p_rows, s_row, 0, p_bounds, n, p_index, d, TABLE, D, BLOCK)
    x = tl.load(p_values + i, mask=m, other=0.0)
    tl.store(a.to(tl.pointer_type(D)), x.to(D), mask=a != 0)


def gather(rows: Rows, bounds: Tensor, index: Tensor, values: Tensor) -> Launch:
    """Fill ``values`` (T, d), in the arithmetic dtype of the rows; ``bounds`` (n + 1,), ``index`` (d,), contiguous."""
    return Launch(
        gather_kernel, (_blocks(index), rows.count), _arguments(rows, bounds, index, values), ENTRIES, fp_fusion=False
    )


def scatter(values: Tensor, bounds: Tensor, index: Tensor, out: Rows) -> Launch:
    """Write ``values`` (d,), in the arithmetic dtype of ``out``, to its one row, but nothing to address 0."""
    return Launch(scatter_kernel, (_blocks(index),), _arguments(out, bounds, index, values), ENTRIES, fp_fusion=False)


def _blocks(index: Tensor) -> int:
    return triton.cdiv(len(index), ENTRIES)


def _arguments(rows: Rows, bounds: Tensor, index: Tensor, values: Tensor) -> dict[str, object]:
    return {
        "p_bounds": bounds,
        "n": len(bounds) - 1,
        "p_index": index,
        "d": len(index),
        "p_values": values,
        "BLOCK": ENTRIES,
        **row_arguments(rows),
    }
