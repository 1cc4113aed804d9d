"""Tables of the addresses of the kernels' arguments.

A table contains nothing but its addresses, so a table that is on the device already is used again for the same
addresses: by the Gramian and the combination of one step, and by the next step if the allocator returns the same
memory. Any other table takes one asynchronous copy. No function here reads the device or waits for it, and memory that
a captured CUDA graph reads at each replay is kept alive.
"""

from collections import defaultdict, deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.kernels.rows import Rows
from gradkern.ops.capture import capturing, keep

TABLES = 1024
"""The number of tables that are kept, of some kilobytes each. Surgery takes two for each dtype, AdamW four for each
parameter group, of which there may be one for each layer, and allocators alternate between a few addresses."""


def table_rows(addresses: tuple[int, ...], n: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Return rows of n tensors each, by a table on the device of the tensors' addresses, row by row."""
    return Rows(_table(addresses, device), n, len(addresses) // n, dtype, table=True)


def matrix_rows(J: Tensor) -> Rows:
    """Return the rows of a matrix with unit column stride."""
    return Rows(J, J.stride(0), J.shape[0], J.dtype, table=False)


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (len(addresses),) int64 on ``device``, for work on its current stream."""
    if device.type == "cpu":
        return torch.tensor(addresses, dtype=torch.int64, device="cpu")
    if capturing(device):
        # The copy happens at each replay and not now, so this table is not cached, and no cached one can be used.
        pinned = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=True)
        keep(pinned)
        return pinned.to(device, non_blocking=True)
    return _copied(addresses, device, torch._C._cuda_getCurrentRawStream(device.index))


@lru_cache(maxsize=TABLES)
def _copied(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Return the table for work on ``stream``, the current one, which orders its copy, its use and its reuse."""
    size = 1 << (len(addresses) - 1).bit_length()
    ring = _rings[device, stream, size]
    staging = ring.popleft() if ring else None  # taken before the query, because another thread may want it
    if staging is not None and not staging.copied.query():
        ring.appendleft(staging)
        staging = None
    staging = staging or _new_staging(size)
    staging.numbers[: len(addresses)] = addresses
    table = staging.pinned[: len(addresses)].to(device, non_blocking=True)
    staging.copied.record(torch.cuda.current_stream(device))
    ring.append(staging)
    return table


class _Staging(NamedTuple):
    """Pinned memory that a device copies from while the host continues."""

    pinned: Tensor
    numbers: NDArray[np.int64]
    """The same memory."""
    copied: torch.cuda.Event
    """The event in the stream after the copy."""


def _new_staging(size: int) -> _Staging:
    pinned = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
    return _Staging(pinned, pinned.numpy(), torch.cuda.Event())


_rings: dict[tuple[torch.device, int, int], deque[_Staging]] = defaultdict(deque)
"""Staging memory by device, stream and size, oldest first. If the oldest has not been copied from, none has, and a new
one is made, because waiting for it would mean waiting for all earlier work. PyTorch's cache of pinned memory does the
same, but data loaders share it and may take memory that a step could reuse, and pinning new memory costs more than all
the rest of a step."""
