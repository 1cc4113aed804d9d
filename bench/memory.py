"""The peak memory of a call, beyond the memory in use before it."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object], device: torch.device | str) -> int:
    """Return the peak bytes of tensors on ``device`` while ``run`` runs, minus the bytes before it; at least 0.

    On a GPU these are the counts of PyTorch's caching allocator, in blocks of 512 bytes. On the CPU they are the
    allocations that PyTorch reports to its profiler. These leave out what NumPy or a BLAS allocates, and memory that
    was allocated before and is freed during the call still counts.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.freeze()  # earlier garbage must not be freed during the call
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        gc.unfreeze()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most
