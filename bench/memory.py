"""What a call holds of memory at the worst moment, beyond what was there before it."""

import gc
import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or each profile writes two lines to stderr


def peak(run: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that tensors on ``device`` take at once while ``run`` runs, over those taken before; at least 0.

    On a GPU as PyTorch's caching allocator counts them, in blocks of 512 bytes. On the CPU as PyTorch's allocator
    reports them to its profiler: what NumPy or a BLAS takes for itself is not among them.
    """
    gc.collect()  # what nobody holds any more must not be freed in the middle of it
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [
        event
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most
