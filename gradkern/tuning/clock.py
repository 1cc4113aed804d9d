"""The clock of a device, and its free memory."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gradkern.ops.devices import GPU

HEAD_START = 1_000_000
"""Cycles for each call, some half a millisecond, in which the host launches it."""
UNKNOWN = 1 << 32
"""The bytes that count as free where nothing tells."""

Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """Return the current time by the host's clock; on a GPU, an event after the work launched so far."""
    if device.type != GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Moment, end: Moment) -> float:
    """Return the seconds between two moments, waiting until the second has passed."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def timed(run: Callable[[], object], calls: int, device: torch.device, ahead: bool = False) -> float:
    """Return the seconds per call over ``calls`` calls in a row; on a GPU by the GPU's own clock.

    Args:
        run: what is called.
        calls: how often.
        device: the device.
        ahead: whether a GPU begins only when the host has launched the calls, so that no launch counts.
    """
    if device.type == GPU:
        torch.cuda.synchronize(device)
        if ahead:
            torch.cuda._sleep(calls * HEAD_START)
    start = now(device)
    for _ in range(calls):
        run()
    return between(start, now(device)) / calls


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    if device.type == GPU:
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")  # Linux only; macOS reports its total memory instead, and Windows nothing
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    if not hasattr(os, "sysconf"):
        return UNKNOWN
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
