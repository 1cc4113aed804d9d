"""The peak memory of a call, beyond the memory in use before it."""

import gc
from collections.abc import Callable

import torch
from torch import autograd

_LEGACY = "_enable_profiler_legacy", "_disable_profiler_legacy", "ProfilerConfig", "ProfilerState", "_profiler_enabled"
"""The names of torch's older profiler. The newer one writes lines of its own to the terminal in some of torch's builds,
and takes longer."""


def peak(run: Callable[[], object], device: torch.device | str) -> int:
    """Return the peak bytes of tensors on ``device`` while ``run`` runs, minus the bytes before it; at least 0.

    On a GPU these are the counts of PyTorch's caching allocator, in blocks of 512 bytes. On the CPU they are the
    allocations that PyTorch reports to its profiler. These leave out what NumPy or a BLAS allocates, and memory that
    was allocated before and is freed during the call still counts.
    """
    device = torch.device(device)
    return _on_gpu(run, device) if device.type == "cuda" else _on_cpu(run)


def is_measurable(device: torch.device) -> bool:
    """Return whether :func:`peak` can tell the memory of a call. On a CPU it cannot while another profiler runs."""
    if device.type == "cpu":
        return all(hasattr(autograd, name) for name in _LEGACY) and not vars(autograd)["_profiler_enabled"]()
    return device.type == "cuda"


def _on_gpu(run: Callable[[], object], device: torch.device) -> int:
    gc.freeze()  # earlier garbage must not be freed during the call
    try:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
    finally:
        gc.unfreeze()
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(run: Callable[[], object]) -> int:
    enable, disable, config, state, _ = (vars(autograd)[name] for name in _LEGACY)
    enable(config(state.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()))
    try:
        run()
    finally:
        of_threads = disable()
    events = [event for of_thread in of_threads for event in of_thread]
    start = next(event for event in events if event.name() == "__start_profile")
    allocations = [event for event in events if event.kind() == "memory_alloc"]
    if len(of_threads) > 1:
        allocations.sort(key=start.cpu_elapsed_us)
    taken = most = 0
    for event in allocations:
        taken += event.cpu_memory_usage()
        most = max(most, taken)
    return most
