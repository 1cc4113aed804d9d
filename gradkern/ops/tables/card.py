"""Whose table it is: the kind of a device, its name, and the versions that its kernels are made with."""

import platform
from typing import NamedTuple

import torch

from gradkern.ops import processor
from gradkern.ops.devices import CPU, GPU
from gradkern.version import __version__


class Card(NamedTuple):
    """A kind of device, and the versions of the software on it. A table of another card serves it in no case."""

    kind: str
    """The type of the device, "cpu" or "cuda"."""
    name: str
    versions: tuple[tuple[str, str], ...]


def card_of(device: torch.device) -> Card | None:
    """Return the card of a device; None for a type of device that has no tables."""
    versions = {"gradkern": __version__, "torch": str(torch.__version__)}  # not a TorchVersion
    if device.type == CPU.type:
        name = f"{processor.name()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    elif device.type == GPU:
        name = gpu(device)
        versions["triton"] = _triton()
    else:
        return None
    return Card(device.type, name, tuple(versions.items()))


def gpu(device: torch.device) -> str:
    """Return the name of a GPU and what compilers call it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return f"{properties.name}, {properties.gcnArchName}"
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
