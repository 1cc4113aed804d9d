"""Functions that depend on the measured device: clock, free memory and name. ``memory.py`` has peak memory."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gradkern.check import processor


def parse_device(text: str) -> torch.device:
    """Return the device with that name, including its number; a GPU becomes the current device.

    Raises:
        argparse.ArgumentTypeError: there is no such device.
    """
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch is built without CUDA
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """Return the current time by the host's clock; on a GPU, an event after the work launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Moment, end: Moment) -> float:
    """Return the seconds between two moments, waiting until the second has passed."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return end - start


def timed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the seconds per call over ``calls`` calls in a row; on a GPU by the GPU's own clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now(device)
    for _ in range(calls):
        run()
    return between(start, now(device)) / calls


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")  # Linux only; other systems report their total memory instead
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name(device: torch.device) -> str:
    """Return the model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.name()
