"""The whole surgery on CUDA tensors: one launch where ``settings.py`` says so, else a launch for each of its steps."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gradkern.kernels import surgery as kernel
from gradkern.kernels.rows import Rows, Tiles
from gradkern.kernels.settings import ONE_LAUNCH_PROGRAMS, one_launch
from gradkern.ops.capture import capturing, ready
from gradkern.ops.layout import TILE, Layout, column_layout
from gradkern.ops.one_launch import unfused
from gradkern.ops.one_launch.unfused import Masking
from gradkern.ops.one_launch.work_list import work_list
from gradkern.ops.partners import check_partner
from gradkern.ops.registration import serve
from gradkern.ops.schema import arithmetic_dtype
from gradkern.ops.triton.address_tables import OptionalTensors, addresses, matrix_rows, table_rows
from gradkern.ops.triton.arguments import mask_of, suppressed, tensor_rows, tiles_of, unit_stride
from gradkern.ops.triton.methods import check_targets, keys_of, pcgrad
from gradkern.ops.triton.rows import combine, gramian


def pcgrad_matrix(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """The sum of PCGrad's modified gradients, (P,), or their mean."""
    J = unit_stride(J)
    T, P = J.shape
    if not _takes_one_launch(T, J.dtype, P):
        C = pcgrad(gramian(J).unsqueeze(0), keys, partner)
        return combine(J, C.mean(-2) if mean else C.sum(-2))
    out = J.new_empty(1, P)
    layout = column_layout((0, P, P))  # nothing is outside surgery
    rows, result = matrix_rows(J), matrix_rows(out)
    method = kernel.Projection(keys, partner, None, None, 0.0, mean)
    _one_launch(method, rows, result, layout, kernel.Masking(None, False), None, J.device)
    return out[0]


def pcgrad_tensors(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor | None,
    partner: str,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As :func:`composed.pcgrad_tensors`."""
    if present is not None or plain is not None or not _tensors_take_one_launch(grads, out):
        return unfused.pcgrad_tensors(grads, segments, n_segments, keys, partner, mean, present, plain, out)
    method = kernel.Projection(keys, partner, None, None, 0.0, mean)
    M, w, _ = _tensor_surgery(method, grads, segments, n_segments, None, out)
    return M, w


def pcgrad_masked(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor | None,
    partner: str,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    units: Sequence[int],
    block: int,
    mask: Tensor,
    products: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`composed.pcgrad_masked`."""
    masking = Masking(units, block, mask, products)
    if present is not None or plain is not None or not _tensors_take_one_launch(grads, out):
        return unfused.pcgrad_masked(grads, segments, n_segments, keys, partner, mean, present, plain, *masking, out)
    method = kernel.Projection(keys, partner, None, None, 0.0, mean)
    return _tensor_surgery(method, grads, segments, n_segments, masking, out)


def gradvac_tensors(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor,
    targets: Tensor,
    moving: Tensor,
    beta: float,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As :func:`composed.gradvac_tensors`."""
    if present is not None or plain is not None or not _tensors_take_one_launch(grads, out):
        return unfused.gradvac_tensors(
            grads, segments, n_segments, keys, targets, moving, beta, mean, present, plain, out
        )
    method = kernel.Projection(keys, "all", targets, moving, beta, mean)
    M, w, _ = _tensor_surgery(method, grads, segments, n_segments, None, out)
    return M, w


def gradvac_masked(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor,
    targets: Tensor,
    moving: Tensor,
    beta: float,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    units: Sequence[int],
    block: int,
    mask: Tensor,
    products: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`composed.gradvac_masked`."""
    masking = Masking(units, block, mask, products)
    if present is not None or plain is not None or not _tensors_take_one_launch(grads, out):
        return unfused.gradvac_masked(
            grads, segments, n_segments, keys, targets, moving, beta, mean, present, plain, *masking, out
        )
    method = kernel.Projection(keys, "all", targets, moving, beta, mean)
    return _tensor_surgery(method, grads, segments, n_segments, masking, out)


def _tensors_take_one_launch(grads: OptionalTensors, out: Sequence[Tensor]) -> bool:
    return bool(out) and _takes_one_launch(len(grads) // len(out), out[0].dtype, sum(o.numel() for o in out))


def _takes_one_launch(T: int, dtype: torch.dtype, P: int) -> bool:
    return P in one_launch(T, dtype.itemsize)


def _tensor_surgery(
    method: kernel.Projection,
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    masking: Masking | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Any]:
    """One launch for gradients left in place; Gramians, weights, and how many entries were kept, None without mask."""
    n = len(segments)
    places = [s if s >= 0 else n_segments for s in segments]
    suppression = None if masking is None else suppressed(masking.units, masking.block, masking.mask)
    row_addresses, like, layout = tensor_rows(grads, places, n_segments + 1, out, suppression)
    device = like.device
    rows, result = (table_rows(r, n, like.dtype, device) for r in (row_addresses, addresses("out", out)))
    mask = mask_of(suppression, layout, device)
    count = None if mask is None else torch.zeros((), dtype=torch.int64, device=device)
    products = masking is not None and masking.products
    M, w = _one_launch(method, rows, result, layout, kernel.Masking(mask, products), count, device)
    return M, w, count


def _one_launch(
    method: kernel.Projection,
    rows: Rows,
    out: Rows,
    layout: Layout,
    masking: kernel.Masking,
    kept: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Gramians and weights; the last segment of ``layout`` is unshared."""
    S, T, dtype = layout.n_segments - 1, rows.count, arithmetic_dtype(rows.dtype)
    M = torch.empty(S, T, T, dtype=dtype, device=device)
    if method.targets is None:
        check_partner(method.order_keys, method.partner)
    if method.order_keys is not None:
        method = method._replace(order_keys=keys_of(method.order_keys, M))
    moving = method.update_mask
    if moving is not None and moving.shape != (T,):
        raise ValueError(f"moving must be of shape {(T,)}, got {tuple(moving.shape)}")
    if method.targets is not None and moving is not None:
        check_targets(method.targets, M)
        method = method._replace(update_mask=moving.contiguous())
    w = torch.empty(S, T, dtype=dtype, device=device)
    work = ready(work_list(layout, T, rows.dtype.itemsize), device)
    items, segments = work.tables_on(device)
    n_counters = kernel.shared_size(S, work.n_groups)
    kernel.surgery(
        rows,
        Tiles(tiles_of(layout, device), TILE),
        masking,
        kernel.Work(items, segments, work.n_pieces, work.n_groups, _shared(n_counters, device)),
        method,
        kernel.Results(M, w, out, kept),
        _programs(device, len(items)),
    ).run(device)
    return M, w


def _programs(device: torch.device, n_items: int) -> int:
    """As many as the device runs at once; one in the interpreter, where that does all the work."""
    return 1 if device.type == "cpu" else min(n_items, ONE_LAUNCH_PROGRAMS * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _shared(n: int, device: torch.device) -> Tensor:
    """Zeros, which a launch leaves behind as zeros: memory for the launches on the current stream, one after another.

    A captured graph clears memory of its own at each replay, for it may be replayed on any stream.
    """
    if capturing(device):
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = device, 0 if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index)
    shared = _of_stream.get(key)  # looked up once: another thread may put a smaller one there
    if shared is None or len(shared) < n:
        shared = _of_stream[key] = torch.zeros(1 << (n - 1).bit_length(), dtype=torch.int32, device=device)
    return shared


_of_stream: dict[tuple[torch.device, int], Tensor] = {}

_OPERATORS: dict[str, Callable[..., object]] = {
    "pcgrad.matrix": pcgrad_matrix,
    "pcgrad.tensors": pcgrad_tensors,
    "pcgrad.masked": pcgrad_masked,
    "gradvac.tensors": gradvac_tensors,
    "gradvac.masked": gradvac_masked,
}
for _name, _function in _OPERATORS.items():
    serve(_name, "cuda", _function)
