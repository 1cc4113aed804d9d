"""Large results on the CPU, in huge pages where the operating system has them.

They often come new from the system, and to be given them in pages of 4 KB takes longer than all the sums that go into a
result. NumPy asks the same for its own arrays.
"""

import ctypes
import mmap
from collections.abc import Callable

from torch import Tensor

LARGE = 1 << 22
"""Bytes, two huge pages; NumPy's threshold too."""


def empty(like: Tensor, count: int) -> Tensor:
    """(count,), empty, like ``like``."""
    result = like.new_empty(count)
    if result.device.type == "cpu" and result.nbytes > LARGE:
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
