"""The operators on CUDA and ROCm tensors: arguments become launches of the Triton kernels.

The functions take any tensors that Triton can launch on, so that the interpreter runs them on CPU tensors; what is
registered is the "CUDA" key, which ROCm shares. Nothing here reads the device: layouts come from shapes, addresses
from ``data_ptr``.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from gradkern.kernels import combine as combine_kernel
from gradkern.kernels import gramian as gramian_kernel
from gradkern.kernels import pcgrad as pcgrad_kernel
from gradkern.kernels import project as project_kernel
from gradkern.kernels import reduce
from gradkern.kernels.rows import Rows
from gradkern.kernels.settings import DOT_T, LONGEST_PIECE, PROGRAMS
from gradkern.layout import TILE, Layout, column_layout, tensor_layout
from gradkern.ops.offsets import column_bounds
from gradkern.ops.schema import arithmetic_dtype, sample

OptionalTensors = Sequence[Tensor | None]


def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """J Jᵀ, (T, T), or (S, T, T) with one for each segment of columns."""
    J = _unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    if T <= DOT_T:
        M = _gramian(_matrix_rows(J), layout, J.device)
    else:
        M = _large_gramian([[row.data_ptr()] for row in J], J.dtype, layout, J.device)
    return M[0] if offsets is None else M


def gramian_tensors(grads: OptionalTensors, segments: Sequence[int], n_segments: int) -> Tensor:
    """(n_segments, T, T) of gradients read where they are."""
    rows, like, layout = _tensor_rows(grads, segments, n_segments, grads)
    if len(rows) <= DOT_T:
        return _gramian(_table_rows(rows, like.dtype, like.device), layout, like.device)
    return _large_gramian(rows, like.dtype, layout, like.device)


def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """wᵀ J, (P,), in J's dtype; with ``offsets`` each segment of columns has its own row of ``w``."""
    J = _unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    out = J.new_empty(1, P)
    weights = _weights("w", w, J.dtype, (layout.n_segments, T))
    tiles = _tiles(layout, J.device)
    combine_kernel.combine(_matrix_rows(J), tiles, TILE, weights, _matrix_rows(out)).run(J.device)
    return out[0]


def combine_tensors(grads: OptionalTensors, w: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """wᵀ J of gradients read where they are, into one tensor for each parameter."""
    n_segments = w.shape[0] if w.ndim > 1 else 1
    rows, like, layout = _tensor_rows(grads, segments, n_segments, out)
    device = like.device
    weights = _weights("w", w, like.dtype, (n_segments, len(rows)))
    source, target = (_table_rows(r, like.dtype, device) for r in (rows, _addresses("out", out, len(segments))))
    combine_kernel.combine(source, _tiles(layout, device), TILE, weights, target).run(device)


def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """W J, (R, P), in J's dtype; with ``offsets`` each segment of columns has its own ``W``."""
    J = _unit_stride(J)
    T, P = J.shape
    layout = column_layout(column_bounds(offsets, P))
    R = W.shape[-2]
    out = J.new_empty(R, P)
    weights = _weights("W", W, J.dtype, (layout.n_segments, R, T))
    tiles = _tiles(layout, J.device)
    project_kernel.project(_matrix_rows(J), tiles, TILE, weights, _matrix_rows(out)).run(J.device)
    return out


def project_tensors(grads: OptionalTensors, W: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """W J of gradients read where they are, into R rows of one tensor for each parameter."""
    n_segments = W.shape[0] if W.ndim > 2 else 1
    rows, like, layout = _tensor_rows(grads, segments, n_segments, out)
    device = like.device
    targets = _addresses("out", out, len(segments))
    weights = _weights("W", W, like.dtype, (n_segments, len(targets), len(rows)))
    source, target = (_table_rows(r, like.dtype, device) for r in (rows, targets))
    project_kernel.project(source, _tiles(layout, device), TILE, weights, target).run(device)


def pcgrad(M: Tensor, keys: Tensor) -> Tensor:
    """Coefficients of PCGrad's projected gradients, (S, T, T), partners visited in ascending ``keys``."""
    if keys.shape[1:] != M.shape[1:] or keys.shape[0] not in (1, M.shape[0]):
        raise ValueError(f"keys must be {tuple(M.shape)} or {(1, *M.shape[1:])}, got {tuple(keys.shape)}")
    C = torch.empty_like(M, memory_format=torch.contiguous_format)
    pcgrad_kernel.pcgrad(M.contiguous(), keys.contiguous(), C).run(M.device)
    return C


def _gramian(rows: Rows, layout: Layout, device: torch.device) -> Tensor:
    """Two launches: partial sums of pieces, then the sum of those."""
    T = rows.count
    dtype = arithmetic_dtype(rows.dtype)
    size = min(LONGEST_PIECE, max(1, len(layout.tiles) // PROGRAMS))
    tiles = _tiles(layout, device)
    pieces, bounds = layout.pieces_on(device, size)
    partials = torch.empty(len(pieces), T * (T + 1) // 2, dtype=dtype, device=device)
    M = torch.empty(layout.n_segments, T, T, dtype=dtype, device=device)
    interpreted = device.type == "cpu"
    tensor_cores = torch.version.hip is None
    gramian_kernel.gramian(rows, tiles, TILE, pieces, partials, tensor_cores, interpreted).run(device)
    reduce.reduce(partials, bounds, M).run(device)
    return M


def _large_gramian(rows: list[list[int]], dtype: torch.dtype, layout: Layout, device: torch.device) -> Tensor:
    """More rows than one launch takes: one launch for each pair of blocks of rows."""
    T = len(rows)
    M = torch.empty(layout.n_segments, T, T, dtype=arithmetic_dtype(dtype), device=device)
    blocks = [range(T)[start : start + DOT_T // 2] for start in range(0, T, DOT_T // 2)]
    for a, b in combinations(blocks, 2):
        both = _gramian(_table_rows([rows[t] for t in (*a, *b)], dtype, device), layout, device)
        n = len(a)
        M[:, a.start : a.stop, a.start : a.stop] = both[:, :n, :n]
        M[:, a.start : a.stop, b.start : b.stop] = both[:, :n, n:]
        M[:, b.start : b.stop, a.start : a.stop] = both[:, n:, :n]
        M[:, b.start : b.stop, b.start : b.stop] = both[:, n:, n:]
    return M


def _unit_stride(J: Tensor) -> Tensor:
    """J itself if its columns are neighbours in memory, else a copy."""
    return J if J.shape[1] <= 1 or J.stride(1) == 1 else J.contiguous()


def _matrix_rows(J: Tensor) -> Rows:
    return Rows(J, J.stride(0), J.shape[0], J.dtype, table=False)


def _table_rows(addresses: list[list[int]], dtype: torch.dtype, device: torch.device) -> Rows:
    return Rows(_on_device(addresses, device), len(addresses[0]), len(addresses), dtype, table=True)


def _tensor_rows(
    grads: OptionalTensors, segments: Sequence[int], n_segments: int, like: OptionalTensors
) -> tuple[list[list[int]], Tensor, Layout]:
    """Addresses of the gradients by row, one gradient as a sample of dtype and device, and their layout.

    ``like`` has the size of tensor k at every index that is k modulo the number of tensors.
    """
    n = len(segments)
    rows = _addresses("grads", grads, n)
    numels = tuple(next((g.numel() for g in like[k::n] if g is not None), 0) for k in range(n))
    return rows, sample((*grads, *like)), tensor_layout(numels, tuple(segments), n_segments)


def _addresses(name: str, tensors: OptionalTensors, n: int) -> list[list[int]]:
    """Addresses of n tensors a row, 0 for a missing one."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{name} must be of one dtype, got {sorted(map(str, dtypes))}")
    flat = [0 if t is None else t.data_ptr() for t in tensors]
    return [flat[start : start + n] for start in range(0, len(flat), n)]


def _weights(name: str, w: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """``w`` as the kernels read it: contiguous, in arithmetic dtype, with a dimension of segments."""
    if tuple(w.shape) != shape and not (shape[0] == 1 and tuple(w.shape) == shape[1:]):
        raise ValueError(f"{name} must have shape {shape if shape[0] > 1 else shape[1:]}, got {tuple(w.shape)}")
    return w.to(arithmetic_dtype(dtype)).contiguous()


_captured: list[Tensor | Layout] = []
"""What captured CUDA graphs read at each replay; nothing tells when the last graph that does is gone."""


def _on_device(values: list[list[int]], device: torch.device) -> Tensor:
    """A table of int64 on ``device`` without waiting for it: from pinned memory, in the order of the stream."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    staging = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
    if _capturing(device):
        _captured.append(staging)
    return staging.to(device, non_blocking=True)


def _tiles(layout: Layout, device: torch.device) -> Tensor:
    """The tile table of ``layout``, which a capture keeps, and must find on the device already.

    Raises:
        RuntimeError: the first use of a layout falls into a capture, where nothing can be copied from pageable memory.
    """
    if _capturing(device):
        if not layout.is_on(device):
            raise RuntimeError("a CUDA graph is being captured: run the same step once before, to lay out its work")
        _captured.append(layout)
    return layout.tiles_on(device)


def _capturing(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_OPERATORS: dict[str, Callable[..., object]] = {
    "gramian": gramian,
    "gramian.tensors": gramian_tensors,
    "combine": combine,
    "combine.tensors": combine_tensors,
    "project": project,
    "project.tensors": project_tensors,
    "pcgrad": pcgrad,
}
for _name, _function in _OPERATORS.items():
    torch.library.impl(f"gradkern::{_name}", "CUDA")(_function)
