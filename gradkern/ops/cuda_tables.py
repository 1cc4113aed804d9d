"""Where the kernels' arguments lie: tables of addresses, new in every step.

Nothing here reads the device or waits for it, and what a captured CUDA graph reads at each replay is kept alive.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.capture import capturing, keep
from gradkern.kernels.rows import Rows

OptionalTensors = Sequence[Tensor | None]


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


def _on_device(values: list[list[int]], device: torch.device) -> Tensor:
    """A table of int64 on ``device`` without waiting for it: from pinned memory, in the order of the stream."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    staging = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=True)
    if capturing(device):
        keep(staging)
    return staging.to(device, non_blocking=True)
