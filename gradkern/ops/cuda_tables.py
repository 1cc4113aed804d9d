"""Where the kernels' arguments lie: tables of addresses, and the tables that stay the same from step to step.

Nothing here reads the device or waits for it, and what a captured CUDA graph reads at each replay is kept alive.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradkern.kernels.rows import Rows
from gradkern.layout import Tables

OptionalTensors = Sequence[Tensor | None]
AnyTables = TypeVar("AnyTables", bound=Tables)


def addresses(name: str, tensors: OptionalTensors, n: int) -> list[list[int]]:
    """Addresses of n tensors a row, 0 for a missing one."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{name} must be of one dtype, got {sorted(map(str, dtypes))}")
    flat = [0 if t is None else t.data_ptr() for t in tensors]
    return [flat[start : start + n] for start in range(0, len(flat), n)]


def table_rows(rows: list[list[int]], dtype: torch.dtype, device: torch.device) -> Rows:
    """Rows behind a table of their addresses, put on the device."""
    return Rows(_on_device(rows, device), len(rows[0]), len(rows), dtype, table=True)


def matrix_rows(J: Tensor) -> Rows:
    """The rows of a matrix of unit column stride."""
    return Rows(J, J.stride(0), J.shape[0], J.dtype, table=False)


def ready(tables: AnyTables, device: torch.device) -> AnyTables:
    """``tables``, which a capture keeps, and must find on the device already.

    Raises:
        RuntimeError: the first use of a layout falls into a capture, where nothing can be copied from pageable memory.
    """
    if _capturing(device):
        if not tables.is_on(device):
            raise RuntimeError("a CUDA graph is being captured: run the same step once before, to lay out its work")
        _captured.append(tables)
    return tables


_captured: list[Tensor | Tables] = []
"""What captured CUDA graphs read at each replay; nothing tells when the last graph that does is gone."""


def _on_device(values: list[list[int]], device: torch.device) -> Tensor:
    """A table of int64 on ``device`` without waiting for it: from pinned memory, in the order of the stream."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    staging = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
    if _capturing(device):
        _captured.append(staging)
    return staging.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
