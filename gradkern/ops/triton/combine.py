"""Combinations and projections on the Triton back end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.kernels import combine as combine_kernel
from gradkern.kernels import project as project_kernel
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads, addresses
from gradkern.ops.layout import column_layout
from gradkern.ops.offsets import column_bounds
from gradkern.ops.out import check_apart
from gradkern.ops.triton.address_tables import matrix_rows, table_rows
from gradkern.ops.triton.arguments import kept_counter, placed, tiles_of, unit_stride, weights_of
from gradkern.ops.triton.backend import implements


@implements(operators.combine)
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute wᵀ J, (P,), in J's dtype; with ``offsets`` each segment of columns has its own row of ``w``."""
    out = J.new_empty(J.shape[1])
    combine_into(J, w, offsets, out)
    return out


@implements(operators.combine_out)
def combine_out(J: Tensor, w: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """Compute wᵀ J in ``out``."""
    check_apart(out, J, w)
    torch.autograd.graph.increment_version(out)  # for backward passes that have saved it
    combine_into(J, w, offsets, out)


def combine_into(J: Tensor, w: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """Compute wᵀ J in ``out``, which no backward pass has saved."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    weights = weights_of("w", w, J.dtype, (layout.n_segments, T))
    tiles = tiles_of(layout, J.device)
    combine_kernel.combine(matrix_rows(J), tiles, None, weights, matrix_rows(out.view(1, P)), None).run(J.device)


@implements(operators.combine_tensors)
def combine_tensors(
    rows: TaskGrads, w: Tensor, out: Sequence[Tensor], mask: Mask | None = None, kept: Tensor | None = None
) -> None:
    """Write wᵀ J of gradients read in place to one tensor for each parameter, and 0 where the mask drops."""
    given = placed(rows, out, mask)
    weights = weights_of("w", w, given.dtype, (rows.n_segments, rows.n_tasks))
    target = table_rows(addresses("out", out), given.n, given.dtype, given.device)
    combine_kernel.combine(given.rows, given.tiles, given.mask, weights, target, kept_counter(kept, mask)).run(
        given.device
    )


@implements(operators.project)
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute W J, (R, P), in J's dtype; with ``offsets`` each segment of columns has its own ``W``."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    R = W.shape[-2]
    out = J.new_empty(R, P)
    weights = weights_of("W", W, J.dtype, (layout.n_segments, R, T))
    project_kernel.project(matrix_rows(J), tiles_of(layout, J.device), weights, matrix_rows(out)).run(J.device)
    return out
