"""The Gramian of T task gradients of P numbers: ours, ``J @ J.T``, and a copy of J, on the CPU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import gradkern as gk
from bench.measure import interleaved, quantiles, ratio

TASKS = (2, 3, 4, 8, 16, 40)
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 4_000_000, 10_000_000)


def sweep(seconds: float) -> Iterator[dict[str, Any]]:
    """One row of results per (T, P), measured for about ``seconds`` each."""
    for T in TASKS:
        for P in SIZES:
            yield measured(torch.randn(T, P), seconds)


def measured(J: Tensor, seconds: float) -> dict[str, Any]:
    """The three contestants on one matrix."""
    copy = torch.empty_like(J)
    contestants = {"gradkern": lambda: gk.gramian(J), "J @ J.T": lambda: J @ J.T, "copy": lambda: copy.copy_(J)}
    times = interleaved(contestants, seconds)
    return {
        "T": J.shape[0],
        "P": J.shape[1],
        "dtype": "float32",
        "bytes": J.nbytes,
        "seconds": {name: quantiles(t) for name, t in times.items()},
        "times as fast as J @ J.T": ratio(times["J @ J.T"], times["gradkern"]),
    }
