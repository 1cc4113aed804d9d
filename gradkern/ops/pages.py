"""Large results on the CPU, in huge pages where the operating system has them.

What is larger than 32 MB comes new from the system each time, and to be given it in pages of 4 KB takes longer than all
the sums that go into a result. NumPy asks the same for its own arrays.
"""

import ctypes
import math
import mmap
from collections.abc import Callable

from torch import Tensor

RECYCLED = 1 << 25
"""Bytes up to which a C library hands out memory that it has had before: glibc's largest ``M_MMAP_THRESHOLD``."""


def empty(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of ``shape``, like ``like``."""
    result = like.new_empty(shape)
    if result.device.type == "cpu" and math.prod(shape) * like.element_size() > RECYCLED:
        first = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (result.data_ptr() + result.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(first, last - first)
    return result


def _advisor() -> Callable[[int, int], object]:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if advice is None:
        return lambda address, length: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda address, length: madvise(address, length, advice)  # a refusal costs nothing but time


_advise = _advisor()
