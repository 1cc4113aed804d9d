"""The cost of a layer's dot products in each of three ways, as a roofline predicts it.

N tokens, weights (q, p), T tasks, k columns of a sketch:

    direct   each task's gradient Dᵀ A, and their dot products     2 T N p q                     flops
    inner    ⟨D_i, (A Aᵀ) D_j⟩                                     2 N² p + 2 T N² q + 2 T² N q  flops
    sketch   Dᵀ (A S), and their dot products                      2 N p k + 2 T N k q           flops
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer: T tasks, N tokens, and a weight (q, p)."""

    tasks: int
    n: int
    p: int
    q: int


@dataclass(frozen=True)
class Machine:
    """A machine as a roofline sees it.

    Attributes:
        flops: float32 operations of matrix products in a second.
        bytes: bytes in a second, from and to memory.
    """

    flops: float
    bytes: float

    def direct(self, s: Sizes, combined: bool) -> float:
        """Return the seconds of gradients that are written and read; with ``combined`` read again and combined."""
        words = (2 + combined) * s.tasks * s.p * s.q
        return self._seconds(2 * s.tasks * s.n * s.p * s.q, words)

    def inner(self, s: Sizes, combined: bool) -> float:
        """Return the seconds of inner products of activations; with ``combined`` those of one weight gradient too."""
        T, N, p, q = s.tasks, s.n, s.p, s.q
        flops = 2 * N * N * p + 2 * T * N * N * q + 2 * T * T * N * q + combined * 2 * N * p * q
        return self._seconds(flops, N * N * (1 + T) + 4 * T * N * q + combined * p * q)

    def _seconds(self, flops: int, words: int) -> float:
        return flops / self.flops + 4 * words / self.bytes


def machine_of(device: torch.device) -> Machine:
    """Return a typical machine with a device: only the ratio of its two numbers decides on a way."""
    return _CPU if device.type == "cpu" else _GPU


_CPU = Machine(flops=1e11, bytes=3.5e10)
"""Measured on one core of an AMD EPYC."""
_GPU = Machine(flops=6e13, bytes=4e12)
"""From data sheets, not measured: an H100's float32 without tensor cores, and HBM3."""
