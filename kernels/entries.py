"""Single entries of the rows, by position in the tensors one after another: read for all rows, written for one.

    values[t, e] = J[t, index[e]]        out[index[e]] = values[e]

Bisection finds the tensor of a position in the table of the tensors' starts and ends. The address is then the row's
table entry plus the rest of the position. An entry costs a 32-byte sector, so ``index`` is ascending: a sector that
neighbours share is read once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .rows import KernelRows, Rows, row_address, row_arguments
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
def find_entries(rows, i_row, bounds, index, ENTRIES: tl.constexpr):
    """(the program's positions among the d of ``index``, whether there are such, addresses of row ``i_row``, or 0)."""
    p_bounds, n = bounds
    p_index, d = index
    i = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    m = i < d
    i_tensor, o = find_tensor(p_bounds, n, tl.load(p_index + i, mask=m, other=0), m)
    return i, m, row_address(rows, i_row, i_tensor, o, m)


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
    ENTRIES: tl.constexpr,
):
    """One program: ENTRIES positions, one row."""
    i_row = tl.program_id(1).to(tl.int64)
    i, m, a = find_entries(KernelRows(p_rows, s_row, TABLE, D, ACC), i_row, (p_bounds, n), (p_index, d), ENTRIES)
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
    ENTRIES: tl.constexpr,
):
    """One program: ENTRIES positions."""
    i, m, a = find_entries(KernelRows(p_rows, s_row, TABLE, D, ACC), 0, (p_bounds, n), (p_index, d), ENTRIES)
    x = tl.load(p_values + i, mask=m, other=0.0)
    tl.store(a.to(tl.pointer_type(D)), x.to(D), mask=a != 0)


def gather(rows: Rows, bounds: Tensor, index: Tensor, values: Tensor) -> Launch:
    """Fill ``values`` (T, d), in the arithmetic dtype of the rows; ``bounds`` (n + 1,), ``index`` (d,), contiguous."""
    grid = _programs(index), rows.count
    return Launch(gather_kernel, grid, _arguments(rows, bounds, index, values), ENTRIES, fp_fusion=False)


def scatter(values: Tensor, bounds: Tensor, index: Tensor, out: Rows) -> Launch:
    """Write ``values`` (d,), in the arithmetic dtype of ``out``, to its one row, but nothing to address 0."""
    return Launch(scatter_kernel, (_programs(index),), _arguments(out, bounds, index, values), ENTRIES, fp_fusion=False)


def _programs(index: Tensor) -> int:
    return triton.cdiv(len(index), ENTRIES)


def _arguments(rows: Rows, bounds: Tensor, index: Tensor, values: Tensor) -> dict[str, object]:
    return {
        "p_bounds": bounds,
        "n": len(bounds) - 1,
        "p_index": index,
        "d": len(index),
        "p_values": values,
        "ENTRIES": ENTRIES,
        **row_arguments(rows),
    }
