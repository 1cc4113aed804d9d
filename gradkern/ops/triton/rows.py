"""The operators on CUDA and ROCm tensors: arguments become launches of the Triton kernels.

The functions take any tensors that Triton can launch on, so that the interpreter runs them on CPU tensors; they are
registered for the device type "cuda", which ROCm shares. Nothing here reads the device: layouts come from shapes,
addresses from ``data_ptr``.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from gradkern.kernels import adamw as adamw_kernel
from gradkern.kernels import combine as combine_kernel
from gradkern.kernels import gramian as gramian_kernel
from gradkern.kernels import project as project_kernel
from gradkern.kernels import reduce
from gradkern.kernels.masks import Mask
from gradkern.kernels.rows import Rows, Tiles
from gradkern.kernels.settings import DOT_T, LONGEST_PIECE, PROGRAMS
from gradkern.ops.layout import TILE, Layout, column_layout
from gradkern.ops.offsets import column_bounds
from gradkern.ops.registration import serve
from gradkern.ops.schema import arithmetic_dtype
from gradkern.ops.triton.address_tables import OptionalTensors, addresses, matrix_rows, table_rows
from gradkern.ops.triton.arguments import (
    Suppressed,
    mask_of,
    suppressed,
    tensor_rows,
    tiles_of,
    unit_stride,
    weights_of,
)
from gradkern.ops.triton.entries import gather, scatter
from gradkern.ops.triton.methods import gradvac, pcgrad


def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """J Jᵀ, (T, T), or (S, T, T) with one for each segment of columns."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    if T <= DOT_T:
        M = _gramian(matrix_rows(J), layout, None, J.device)
    else:
        M = _large_gramian(addresses("J", list(J)), T, J.dtype, layout, None, J.device)
    return M[0] if offsets is None else M


def gramian_tensors(grads: OptionalTensors, segments: Sequence[int], n_segments: int) -> Tensor:
    """(n_segments, T, T) of gradients read where they are."""
    return _tensor_gramian(grads, segments, n_segments, None)


def gramian_masked(
    grads: OptionalTensors, segments: Sequence[int], n_segments: int, units: Sequence[int], block: int, mask: Tensor
) -> Tensor:
    """As :func:`gramian_tensors`, of the entries that the mask keeps."""
    return _tensor_gramian(grads, segments, n_segments, suppressed(units, block, mask))


def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """wᵀ J, (P,), in J's dtype; with ``offsets`` each segment of columns has its own row of ``w``."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    out = J.new_empty(1, P)
    weights = weights_of("w", w, J.dtype, (layout.n_segments, T))
    tiles = tiles_of(layout, J.device)
    combine_kernel.combine(matrix_rows(J), Tiles(tiles, TILE), None, weights, matrix_rows(out), None).run(J.device)
    return out[0]


def combine_tensors(grads: OptionalTensors, w: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """wᵀ J of gradients read where they are, into one tensor for each parameter."""
    _tensor_combine(grads, w, segments, out, None, None)


def combine_masked(
    grads: OptionalTensors,
    w: Tensor,
    segments: Sequence[int],
    units: Sequence[int],
    block: int,
    mask: Tensor,
    out: Sequence[Tensor],
) -> Tensor:
    """As :func:`combine_tensors`, 0 where the mask drops; returns how many entries of masked tensors it keeps."""
    count = torch.zeros((), dtype=torch.int64, device=mask.device)
    _tensor_combine(grads, w, segments, out, suppressed(units, block, mask), count)
    return count


def adamw(
    grads: OptionalTensors,
    w: Tensor,
    segments: Sequence[int],
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
) -> None:
    """A step of AdamW along :func:`combine_tensors`'s result."""
    _tensor_step(grads, w, segments, params, moments, steps, found_inf, lr_scale, hyperparameters, None, None)


def adamw_masked(
    grads: OptionalTensors,
    w: Tensor,
    segments: Sequence[int],
    units: Sequence[int],
    block: int,
    mask: Tensor,
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
) -> Tensor:
    """A step of AdamW along :func:`combine_masked`'s result; returns what that does."""
    count = torch.zeros((), dtype=torch.int64, device=mask.device)
    suppression = suppressed(units, block, mask)
    _tensor_step(grads, w, segments, params, moments, steps, found_inf, lr_scale, hyperparameters, suppression, count)
    return count


def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """W J, (R, P), in J's dtype; with ``offsets`` each segment of columns has its own ``W``."""
    J = unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    R = W.shape[-2]
    out = J.new_empty(R, P)
    weights = weights_of("W", W, J.dtype, (layout.n_segments, R, T))
    tiles = tiles_of(layout, J.device)
    project_kernel.project(matrix_rows(J), Tiles(tiles, TILE), weights, matrix_rows(out)).run(J.device)
    return out


def project_tensors(grads: OptionalTensors, W: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """W J of gradients read where they are, into R rows of one tensor for each parameter."""
    n_segments = W.shape[0] if W.ndim > 2 else 1
    n = len(segments)
    rows, like, layout = tensor_rows(grads, segments, n_segments, out, None)
    device = like.device
    weights = weights_of("W", W, like.dtype, (n_segments, len(out) // n, len(grads) // n))
    source, target = (table_rows(r, n, like.dtype, device) for r in (rows, addresses("out", out)))
    project_kernel.project(source, Tiles(tiles_of(layout, device), TILE), weights, target).run(device)


def _tensor_gramian(
    grads: OptionalTensors, segments: Sequence[int], n_segments: int, suppression: Suppressed | None
) -> Tensor:
    n, T = len(segments), len(grads) // len(segments)
    rows, like, layout = tensor_rows(grads, segments, n_segments, grads, suppression)
    mask = mask_of(suppression, layout, like.device)
    if T <= DOT_T:
        return _gramian(table_rows(rows, n, like.dtype, like.device), layout, mask, like.device)
    return _large_gramian(rows, T, like.dtype, layout, mask, like.device)


def _tensor_combine(
    grads: OptionalTensors,
    w: Tensor,
    segments: Sequence[int],
    out: Sequence[Tensor],
    suppression: Suppressed | None,
    count: Tensor | None,
) -> None:
    n, n_segments = len(segments), w.shape[0] if w.ndim > 1 else 1
    rows, like, layout = tensor_rows(grads, segments, n_segments, out, suppression)
    device = like.device
    weights = weights_of("w", w, like.dtype, (n_segments, len(grads) // n))
    source, target = (table_rows(r, n, like.dtype, device) for r in (rows, addresses("out", out)))
    tiles, mask = tiles_of(layout, device), mask_of(suppression, layout, device)
    combine_kernel.combine(source, Tiles(tiles, TILE), mask, weights, target, count).run(device)


def _tensor_step(
    grads: OptionalTensors,
    w: Tensor,
    segments: Sequence[int],
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
    suppression: Suppressed | None,
    count: Tensor | None,
) -> None:
    n, n_segments = len(segments), w.shape[0] if w.ndim > 1 else 1
    rows, like, layout = tensor_rows(grads, segments, n_segments, params, suppression)
    device, moment = params[0].device, moments[0].dtype
    adamw_kernel.adamw(
        table_rows(rows, n, like.dtype, device),
        Tiles(tiles_of(layout, device), TILE),
        mask_of(suppression, layout, device),
        weights_of("w", w, moment, (n_segments, len(grads) // n)),
        count,
        adamw_kernel.AdamWState(
            table_rows(addresses("params", params), n, params[0].dtype, device),
            table_rows(addresses("moments", moments), n, moment, device),
            table_rows(addresses("steps", steps), n, torch.float32, device).source,
        ),
        adamw_kernel.AdamWStep(found_inf, lr_scale, hyperparameters),
    ).run(device)


def _gramian(rows: Rows, layout: Layout, mask: Mask | None, device: torch.device) -> Tensor:
    """Two launches: partial sums of pieces, then the sum of those."""
    T = rows.count
    dtype = arithmetic_dtype(rows.dtype)
    size = min(LONGEST_PIECE, max(1, len(layout.tiles) // PROGRAMS))
    tiles = tiles_of(layout, device)
    pieces, bounds = layout.pieces_on(device, size)
    partials = torch.empty(len(pieces), T * (T + 1) // 2, dtype=dtype, device=device)
    M = torch.empty(layout.n_segments, T, T, dtype=dtype, device=device)
    interpreted = device.type == "cpu"
    tensor_cores = torch.version.hip is None
    target = gramian_kernel.Target(tensor_cores, interpreted)
    gramian_kernel.gramian(rows, Tiles(tiles, TILE), mask, pieces, partials, target).run(device)
    reduce.reduce(partials, bounds, M).run(device)
    return M


def _large_gramian(
    rows: tuple[int, ...], T: int, dtype: torch.dtype, layout: Layout, mask: Mask | None, device: torch.device
) -> Tensor:
    """More rows than one launch takes, by their addresses: one launch for each pair of blocks of rows."""
    n = len(rows) // T
    M = torch.empty(layout.n_segments, T, T, dtype=arithmetic_dtype(dtype), device=device)
    blocks = [range(T)[start : start + DOT_T // 2] for start in range(0, T, DOT_T // 2)]
    for a, b in combinations(blocks, 2):
        of_both = rows[n * a.start : n * a.stop] + rows[n * b.start : n * b.stop]
        both = _gramian(table_rows(of_both, n, dtype, device), layout, mask, device)
        c = len(a)
        M[:, a.start : a.stop, a.start : a.stop] = both[:, :c, :c]
        M[:, a.start : a.stop, b.start : b.stop] = both[:, :c, c:]
        M[:, b.start : b.stop, a.start : a.stop] = both[:, c:, :c]
        M[:, b.start : b.stop, b.start : b.stop] = both[:, c:, c:]
    return M


_OPERATORS: dict[str, Callable[..., object]] = {
    "gramian": gramian,
    "gramian.tensors": gramian_tensors,
    "gramian.masked": gramian_masked,
    "combine": combine,
    "combine.tensors": combine_tensors,
    "combine.masked": combine_masked,
    "project": project,
    "project.tensors": project_tensors,
    "gather": gather,
    "scatter": scatter,
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    "adamw": adamw,
    "adamw.masked": adamw_masked,
}
for _name, _function in _OPERATORS.items():
    serve(_name, "cuda", _function)
