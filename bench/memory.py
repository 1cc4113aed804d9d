"""What a call holds of memory at the worst moment, beyond what was there before it."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that tensors on ``device`` take at once while ``run`` runs, over those taken before; at least 0.

    On a GPU as PyTorch's caching allocator counts them, in blocks of 512 bytes. On the CPU as PyTorch's allocator
    reports them to its profiler: what NumPy or a BLAS takes for itself is not among them, and memory from before that
    is freed meanwhile still counts.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.freeze()  # garbage of before must not be freed in the middle of it
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
