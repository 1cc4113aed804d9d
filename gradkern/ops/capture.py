"""CUDA graphs: what a captured one reads at each replay must be on the device beforehand, and stay there."""

from typing import TypeVar

import torch
from torch import Tensor

from gradkern.ops.devices import GPU
from gradkern.ops.layout import Tables

AnyTables = TypeVar("AnyTables", bound=Tables)


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is now recorded instead of done."""
    if device.type != GPU:
        return False
    if device.index == torch.cuda.current_device():  # as nearly always; to change the device costs more than to ask
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def keep(what: Tensor | Tables) -> None:
    """Never let go of ``what``: nothing tells when the last graph that reads it is gone."""
    _captured.append(what)


def ready(tables: AnyTables, device: torch.device) -> AnyTables:
    """``tables``, which a capture keeps, and must find on the device already.

    Raises:
        RuntimeError: their first use falls into a capture, where nothing can be copied from pageable memory.
    """
    if capturing(device):
        if not tables.is_on(device):
            raise first_use("to lay out its work")
        keep(tables)
    return tables


def first_use(purpose: str) -> RuntimeError:
    """The error for a step that has something to make, and cannot while it is captured."""
    return RuntimeError(f"a CUDA graph is being captured: run the same step once before, {purpose}")


_captured: list[Tensor | Tables] = []
