"""The whole surgery in one launch, as the Triton back end implements it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.kernels import surgery as kernel
from gradkern.kernels.masks import Mask as TileMask
from gradkern.kernels.rows import Rows
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, ProjectionArguments, TaskGrads, addresses
from gradkern.ops.capture import ready
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import Layout, column_layout
from gradkern.ops.one_launch import sizes
from gradkern.ops.one_launch.work_list import work_list
from gradkern.ops.one_launch.workspace import counters, n_programs
from gradkern.ops.out import check_apart
from gradkern.ops.partners import check_partner
from gradkern.ops.triton.address_tables import matrix_rows, table_rows
from gradkern.ops.triton.arguments import kept_counter, placed, tiles_of, unit_stride
from gradkern.ops.triton.backend import implements
from gradkern.ops.triton.checks import check_order_keys, check_targets
from gradkern.ops.triton.combine import combine_into
from gradkern.ops.triton.gramian import gramian
from gradkern.ops.triton.methods import pcgrad


def surgery(
    rows: TaskGrads,
    method: ProjectionArguments,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    products_masked: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do the surgery of gradients read in place: return Gramians and weights, and write ``out``."""
    last = rows.n_segments
    segments = [s if s >= 0 else last for s in rows.segments]
    given = placed(TaskGrads(rows.grads, segments, last + 1), out, mask)
    result = table_rows(addresses("out", out), given.n, given.dtype, given.device)
    return _launch(given.rows, given.layout, given.mask, method, products_masked, result, kept_counter(kept, mask))


if torch.version.hip is None:  # on AMD's GPUs a barrier does not wait for other waves' stores
    implements(operators.surgery)(surgery)


@implements(operators.pcgrad_matrix)
def pcgrad_matrix(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """Compute PCGrad's update of a matrix, (P,): in one launch if the table has its size, else step by step."""
    out = J.new_empty(J.shape[1])
    _pcgrad_into(J, order_keys, partner, mean, out)
    return out


@implements(operators.pcgrad_matrix_out)
def pcgrad_matrix_out(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool, out: Tensor) -> None:
    """Compute PCGrad's update of a matrix in ``out``."""
    check_apart(out, J)
    torch.autograd.graph.increment_version(out)  # for backward passes that have saved it
    _pcgrad_into(J, order_keys, partner, mean, out)


def _pcgrad_into(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool, out: Tensor) -> None:
    J = unit_stride(J)
    T, P = J.shape
    if P not in sizes(J.device, T, J.dtype):
        C = pcgrad(gramian(J).unsqueeze(0), order_keys, partner)
        combine_into(J, C.mean(-2) if mean else C.sum(-2), None, out)
        return
    layout = column_layout((0, P, P))  # nothing is unshared
    method = ProjectionArguments(order_keys, partner, None, None, 0.0, mean)
    _launch(matrix_rows(J), layout, None, method, False, matrix_rows(out.view(1, P)), None)


def _launch(
    rows: Rows,
    layout: Layout,
    mask: TileMask | None,
    method: ProjectionArguments,
    products_masked: bool,
    out: Rows,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return Gramians and weights; the last segment of ``layout`` holds the unshared parameters."""
    S, T, dtype, device = layout.n_segments - 1, rows.count, arithmetic_dtype(rows.dtype), rows.source.device
    M = torch.empty(S, T, T, dtype=dtype, device=device)
    w = torch.empty(S, T, dtype=dtype, device=device)
    work = ready(work_list(layout, T, rows.dtype.itemsize), device)
    items, segments = work.tables_on(device)
    shared = counters(kernel.shared_size(S, work.n_groups), device)
    kernel.surgery(
        rows,
        tiles_of(layout, device),
        kernel.Masking(mask, products_masked),
        kernel.Work(items, segments, work.n_pieces, work.n_groups, shared),
        _checked(method, M),
        kernel.Results(M, w, out, kept),
        n_programs(device, len(items)),
    ).run(device)
    return M, w


def _checked(method: ProjectionArguments, M: Tensor) -> kernel.Projection:
    """Return the method in the kernel's form; raise ValueError unless its tensors fit the Gramians M (S, T, T)."""
    keys, targets, update_mask = method.order_keys, method.targets, method.update_mask
    check_partner(keys, method.partner)
    if keys is not None:
        keys = check_order_keys(keys, M)
    if targets is not None:
        check_targets(targets, M)
    if update_mask is not None:
        if update_mask.shape != M.shape[-1:]:
            raise ValueError(f"update_mask must be of shape {tuple(M.shape[-1:])}, got {tuple(update_mask.shape)}")
        update_mask = update_mask.contiguous()
    return kernel.Projection(keys, method.partner, targets, update_mask, method.beta, method.mean)
