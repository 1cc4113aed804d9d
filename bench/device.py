"""Functions that depend on the measured device: clock, free memory and name. ``memory.py`` has peak memory."""

import argparse

import torch

from gradkern.ops import processor
from gradkern.tuning.clock import Moment, between, free_bytes, now, timed

__all__ = ["Moment", "between", "free_bytes", "name", "now", "parse_device", "timed"]


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


def name(device: torch.device) -> str:
    """Return the model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.name()
