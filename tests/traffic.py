"""A counter of the bytes that the kernels move in Triton's interpreter.

It counts the 32-byte sectors that hold the elements an instruction's mask lets through, each sector once for each
instruction of a program. A GPU fetches them so: memory hands out whole sectors, and a warp's requests for one sector
are one request. Savings of a cache between instructions are not subtracted, so the count is the requested traffic.
Gradients and results are counted by themselves. Tables, weights, partial sums and all else are counted together, and
atomics are not counted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

SECTOR = 32


@dataclass
class Traffic:
    """Numbers of bytes moved."""

    read: int = 0
    """Bytes read from the watched tensors."""
    written: int = 0
    """Bytes written to the watched tensors."""
    elsewhere: int = 0
    """Bytes read from and written to all other memory."""


@contextmanager
def watching(tensors: Sequence[Tensor]) -> Iterator[Traffic]:
    """Count the bytes that interpreted kernels move of ``tensors``. Each tensor starts on a sector."""
    starts = np.array(sorted(t.data_ptr() for t in tensors), dtype=np.uint64)
    ends = np.array([0, *sorted(t.data_ptr() + t.nbytes for t in tensors)], dtype=np.uint64)
    assert not (starts % SECTOR).any(), "a tensor begins within a sector"
    traffic = Traffic()

    def moved(addresses: NDArray[np.uint64], mask: NDArray[np.int64]) -> int:
        asked = addresses[np.broadcast_to(mask != 0, addresses.shape)]
        m_watched = asked < ends[np.searchsorted(starts, asked, side="right")]
        traffic.elsewhere += SECTOR * len(np.unique(asked[~m_watched] // SECTOR))
        return SECTOR * len(np.unique(asked[m_watched] // SECTOR))

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        traffic.read += moved(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
        traffic.written += moved(ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def aligned(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random tensor that starts on a sector, as all tensors on a GPU do."""
    buffer = torch.randn(numel + SECTOR, dtype=torch.float32).to(dtype)
    offset = -(buffer.data_ptr() // buffer.itemsize) % (SECTOR // buffer.itemsize)
    return buffer[offset : offset + numel]
