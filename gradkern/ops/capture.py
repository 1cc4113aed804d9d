"""Capture of CUDA graphs: data that a graph reads at each replay must be on the device before, and stay there."""

from typing import TypeVar

import torch
from torch import Tensor

from gradkern.ops.devices import GPU
from gradkern.ops.layout import Tables

AnyTables = TypeVar("AnyTables", bound=Tables)


def capturing(device: torch.device) -> bool:
    """Return whether work on ``device`` is being captured instead of run."""
    if device.type != GPU:
        return False
    if device.index == torch.cuda.current_device():  # the usual case; switching the device costs more than this check
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def keep(data: Tensor | Tables) -> None:
    """Keep ``data`` alive forever, because nothing reveals when the last graph that reads it is gone."""
    _captured.append(data)


def ready(tables: AnyTables, device: torch.device) -> AnyTables:
    """Return ``tables``; during a capture, keep them and require that they are on the device already.

    Raises:
        RuntimeError: their first use is during a capture, which cannot copy from pageable memory.
    """
    if capturing(device):
        if not tables.is_on(device):
            raise first_use("to lay out its work")
        keep(tables)
    return tables


def first_use(purpose: str) -> RuntimeError:
    """Return the error for a step that must create something, and cannot while it is being captured."""
    return RuntimeError(f"a CUDA graph is being captured: run the same step once before, {purpose}")


_captured: list[Tensor | Tables] = []
