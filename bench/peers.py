"""Whom else to measure: which of them are here, in which version, and why another is not."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

COMPILE, TORCHJD, PYTORCH_OPTIMIZER = "torch.compile", "TorchJD", "pytorch_optimizer"
PACKAGES = {TORCHJD: "torchjd", PYTORCH_OPTIMIZER: "pytorch_optimizer"}


@dataclass(frozen=True)
class Peers:
    """By name: the versions of those found, and why the others are missing."""

    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def installed() -> Peers:
    """Look for the other libraries."""
    peers = Peers()
    for name, package in PACKAGES.items():
        try:
            import_module(package)
            peers.found[name] = version(package)
        except Exception as error:  # not installed, or unfit for this torch
            peers.missing[name] = _first_line(error)
    return peers


def find(device: torch.device) -> Peers:
    """Look for every peer."""
    peers = installed()
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        peers.found[COMPILE] = torch.__version__
    except Exception as error:  # whatever a missing or unfit compiler leads to
        peers.missing[COMPILE] = _first_line(error)
    return peers


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled for any P; for each T and dtype anew, which torch would give up after 8 of them."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True, fullgraph=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
