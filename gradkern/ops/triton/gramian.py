"""Gramians on the Triton back end."""

from itertools import combinations

import torch
from torch import Tensor

from gradkern.kernels import gramian as kernel
from gradkern.kernels import reduce
from gradkern.kernels.masks import Mask as TileMask
from gradkern.kernels.rows import Rows
from gradkern.kernels.served import setting_for
from gradkern.kernels.settings import DOT_T
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads, addresses
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import Layout, column_layout
from gradkern.ops.offsets import column_bounds
from gradkern.ops.triton.address_tables import matrix_rows, table_rows
from gradkern.ops.triton.arguments import Placed, is_interpreted, placed, tiles_of, unit_stride
from gradkern.ops.triton.backend import implements


@implements(operators.gramian)
def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute J Jᵀ, (T, T), or (S, T, T) with one for each segment of columns."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    if T <= DOT_T:
        M = _gramian(matrix_rows(J), layout, None, J.device)
    else:
        M = _large_gramian(Placed(addresses("J", list(J)), 1, J.dtype, J.device, layout, None))
    return M[0] if offsets is None else M


@implements(operators.gramian_tensors)
def gramian_tensors(rows: TaskGrads, mask: Mask | None = None) -> Tensor:
    """Compute Gramians (S, T, T) of gradients read in place, over the entries that the mask keeps."""
    given = placed(rows, rows.grads, mask)
    if rows.n_tasks <= DOT_T:
        return _gramian(given.rows, given.layout, given.mask, given.device)
    return _large_gramian(given)


def _gramian(rows: Rows, layout: Layout, mask: TileMask | None, device: torch.device) -> Tensor:
    """Compute partial sums of the pieces in one launch, and their totals in a second."""
    T = rows.count
    dtype = arithmetic_dtype(rows.dtype)
    programs, longest = setting_for("pieces", rows)
    size = min(longest, max(1, len(layout.tiles) // programs))
    tiles = tiles_of(layout, device)
    pieces, bounds = layout.pieces_on(device, size)
    partials = torch.empty(len(pieces), T * (T + 1) // 2, dtype=dtype, device=device)
    M = torch.empty(layout.n_segments, T, T, dtype=dtype, device=device)
    target = kernel.Target(tensor_cores=torch.version.hip is None, interpreted=is_interpreted(device))
    kernel.gramian(rows, tiles, mask, pieces, partials, target).run(device)
    reduce.reduce(partials, bounds, M).run(device)
    return M


def _large_gramian(given: Placed) -> Tensor:
    """Compute the Gramian of more rows than a launch takes, by one launch for each pair of blocks of rows."""
    n, T = given.n, len(given.addresses) // given.n
    M = torch.empty(given.layout.n_segments, T, T, dtype=arithmetic_dtype(given.dtype), device=given.device)
    blocks = [range(T)[start : start + DOT_T // 2] for start in range(0, T, DOT_T // 2)]
    for a, b in combinations(blocks, 2):
        of_both = given.addresses[n * a.start : n * a.stop] + given.addresses[n * b.start : n * b.stop]
        rows = table_rows(of_both, n, given.dtype, given.device)
        both = _gramian(rows, given.layout, given.mask, given.device)
        c = len(a)
        M[:, a.start : a.stop, a.start : a.stop] = both[:, :c, :c]
        M[:, a.start : a.stop, b.start : b.stop] = both[:, :c, c:]
        M[:, b.start : b.stop, a.start : a.stop] = both[:, c:, :c]
        M[:, b.start : b.stop, b.start : b.stop] = both[:, c:, c:]
    return M
