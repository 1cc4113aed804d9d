"""All that depends on where is measured: the clock, the free memory, the name; and in ``memory.py`` peak memory."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gradkern.check import processor


def chosen(text: str) -> torch.device:
    """The device of that name, with its number, and the current one from now on.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """This moment by the host's clock; on a GPU the one when it gets to what was launched last."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Moment, end: Moment) -> float:
    """Seconds from one moment to another, which is waited for."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return end - start


def timed(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of so many calls in a row; on a GPU as the GPU's own clock tells."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now(device)
    for _ in range(calls):
        run()
    return between(start, now(device)) / calls


def free_bytes(device: torch.device) -> int:
    """Memory that is there for the taking."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")  # Linux only; elsewhere all the memory there is stands in
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def name(device: torch.device) -> str:
    """The GPU's, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.name()
