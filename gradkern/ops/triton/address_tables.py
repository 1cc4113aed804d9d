"""Tables of the addresses at which the kernels' arguments lie.

A table says nothing but its addresses, so one that is on the device already serves whoever asks for the same again:
the Gramian and the combination of one step, and the next step where the allocator hands out the same memory. Any other
takes one asynchronous copy. Nothing here reads the device or waits for it, and what a captured CUDA graph reads at
each replay is kept alive.
"""

from collections import defaultdict, deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.kernels.rows import Rows
from gradkern.ops.arguments import OptionalTensors
from gradkern.ops.capture import capturing, keep

TABLES = 1024
"""The number of tables that are kept, of some kilobytes: surgery takes two for each dtype, AdamW four for each of its
parameter groups, of which there may be one for each layer, and allocators take turns among a few addresses."""


def addresses(name: str, tensors: OptionalTensors) -> tuple[int, ...]:
    """The tensors' addresses, 0 for a missing one."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{name} must be of one dtype, got {sorted(map(str, dtypes))}")
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def table_rows(addresses: tuple[int, ...], n: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Rows of n tensors each, one row after another, behind a table of their addresses on the device."""
    return Rows(_table(addresses, device), n, len(addresses) // n, dtype, table=True)


def matrix_rows(J: Tensor) -> Rows:
    """The rows of a matrix of unit column stride."""
    return Rows(J, J.stride(0), J.shape[0], J.dtype, table=False)


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """(len(addresses),) int64 on ``device``, for work on its current stream."""
    if device.type == "cpu":
        return torch.tensor(addresses, dtype=torch.int64, device="cpu")
    if capturing(device):
        # The copy happens at each replay and not now, so such a table is never kept, and no kept one is of use.
        pinned = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=True)
        keep(pinned)
        return pinned.to(device, non_blocking=True)
    return _copied(addresses, device, torch._C._cuda_getCurrentRawStream(device.index))


@lru_cache(maxsize=TABLES)
def _copied(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The table for work on ``stream``, the current one: in its order it is copied, read and, once let go, reused."""
    size = 1 << (len(addresses) - 1).bit_length()
    ring = _rings[device, stream, size]
    staging = ring.popleft() if ring else None  # taken before it is asked, for another thread may take it too
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
    """Memory that a device copies from while the host goes on."""

    pinned: Tensor
    numbers: NDArray[np.int64]
    """The same memory."""
    copied: torch.cuda.Event
    """Where in the stream it has been copied from."""


def _new_staging(size: int) -> _Staging:
    pinned = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
    return _Staging(pinned, pinned.numpy(), torch.cuda.Event())


_rings: dict[tuple[torch.device, int, int], deque[_Staging]] = defaultdict(deque)
"""By device, stream and size, oldest first: where that one has not been copied from, none has, and one more is made,
for to wait would be to wait for the work before it. PyTorch's cache of pinned memory would do the same, but data
loaders share it and may have taken what a step could reuse, and to pin anew costs more than all the rest of a step."""
