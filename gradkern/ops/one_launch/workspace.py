"""The number of programs of the one launch, and the counters by which they share their work."""

from functools import cache

import torch
from torch import Tensor

from gradkern.kernels.settings import ONE_LAUNCH_PROGRAMS
from gradkern.ops.capture import capturing
from gradkern.ops.triton.arguments import is_interpreted


def n_programs(device: torch.device, n_items: int) -> int:
    """Return the number of programs that a device runs at once: one in the interpreter, where it does all the work."""
    return 1 if is_interpreted(device) else min(n_items, ONE_LAUNCH_PROGRAMS * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def counters(n: int, device: torch.device) -> Tensor:
    """Return zeros, which a launch leaves as zeros, so that successive launches on a stream share them.

    A captured graph clears memory of its own at each replay, because it may be replayed on any stream.
    """
    if capturing(device):
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = device, 0 if is_interpreted(device) else torch._C._cuda_getCurrentRawStream(device.index)
    found = _of_stream.get(key)  # read once: another thread may store a smaller one
    if found is None or len(found) < n:
        found = _of_stream[key] = torch.zeros(1 << (n - 1).bit_length(), dtype=torch.int32, device=device)
    return found


_of_stream: dict[tuple[torch.device, int], Tensor] = {}
