"""The other libraries and torch.compile: installed versions, and reasons why one is missing."""

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
    """Versions of the peers found, and reasons why the others are missing, by name."""

    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def installed_peers() -> Peers:
    """Look for the other libraries."""
    peers = Peers()
    for name, package in PACKAGES.items():
        try:
            import_module(package)
            peers.found[name] = version(package)
        except Exception as error:  # not installed, or incompatible with this torch
            peers.missing[name] = _first_line(error)
    return peers


def find_peers(device: torch.device) -> Peers:
    """Look for the other libraries and for a working torch.compile."""
    peers = installed_peers()
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        peers.found[COMPILE] = torch.__version__
    except Exception as error:  # a missing or unsuitable compiler raises errors of many types
        peers.missing[COMPILE] = _first_line(error)
    return peers


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function`` for any P. Each T and dtype recompiles it, beyond torch's default limit of 8."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True, fullgraph=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
