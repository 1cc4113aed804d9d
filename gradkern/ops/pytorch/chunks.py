"""The fixed shapes in which a BLAS multiplies rows, so that its results are the same to the last bit.

The order in which a BLAS sums up a product depends on its shape and strides, on the rows' addresses modulo 64 bytes,
and on the number of threads that share the product. So a Gramian is made of small products that are always alike:

- The columns are cut into chunks of equal width, and a rest, by T and P alone.
- Rows start at a multiple of 64 bytes, as PyTorch's allocator returns memory, and at a fixed distance. Other places are
  used only if ``observed.py`` finds that this changes nothing.
- Products are computed in batches of two at least, because a BLAS shares a single product among its threads. It may
  share those of a batch too, if they are fewer than the threads. ``observed.py`` finds out whether that changes
  anything; if so, copies of each product fill the batch.
- The T x T products are added up in a binary tree of element-wise additions, each of them rounded as IEEE 754 says
  (``gramian.py``).

The result is a function of the numbers, T and P. It does not depend on addresses, on gaps between rows, on whether rows
are given as a matrix or as a list of tensors, on the number of threads, or on the load of the machine. Another
processor, instruction set or BLAS may give other bits, within the bound of :func:`error_bound`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.kernels.served import Tunable, served
from gradkern.ops.devices import CPU

LONGEST = 2048
"""The greatest number of columns of a chunk, the length of a sum in the BLAS's order. A longer chunk has a greater
error, but there are fewer T x T products. With chunks half as long two rows of a million take a seventh longer, forty
no longer."""
LINE = 64
"""The number of bytes of a cache line."""
PARTIALS = 1 << 21
"""The count of numbers in the T x T products that wait to be added, 8 MB of float32."""
SCRATCH = 1 << 19
"""The count of numbers in a block of scratch memory, all rows together: 2 MB of float32, the size of a core's
second-level cache. Half or twice as many took a tenth longer."""
MOST = 64
"""The greatest number of rows of a product: a BLAS would split a larger one among many threads."""

Batch = tuple[Tensor, int]
"""Chunks, (k, T, width) with k >= 2, and the number of them that count."""


class ChunkSetting(NamedTuple):
    """Setting of the cut; see ``LONGEST`` and ``SCRATCH``. Chunks longer than the default break the error bound."""

    LONGEST: int
    SCRATCH: int


served.tunable["chunks"] = Tunable((3, 8, 16, 40), lambda T, itemsize: ChunkSetting(LONGEST, SCRATCH))


class Cut(NamedTuple):
    """The chunks into which the columns of rows are cut, and the blocks in which they are copied to scratch memory."""

    width: int
    """The number of columns of a chunk."""
    chunks: int
    """The number of chunks."""
    rest: int
    """The number of columns after the last chunk."""
    group: int
    """The number of products that wait to be added: those of whole blocks."""
    blocks: tuple[tuple[int, int], ...]
    """The consecutive blocks of scratch memory: their numbers of columns, and the distances of their rows."""
    at_once: bool
    """Whether all columns are in one block, as a contiguous matrix."""

    @property
    def terms(self) -> int:
        """The number of products."""
        return self.chunks + (self.rest > 0)


@lru_cache(maxsize=4096)
def cut(T: int, P: int, itemsize: int) -> Cut:
    """Return the cut of T rows of P numbers, ``itemsize`` bytes each in arithmetic."""
    setting = served["chunks", T, itemsize, CPU]
    longest = setting.LONGEST
    if T * P <= setting.SCRATCH or P <= 2 * setting.LONGEST:  # all in one block, as a contiguous matrix
        least = max(2, -(-P // longest)) if P > 1 else 1
        chunks = next((n for n in range(least, 2 * least) if P % n == 0), least)
        width = P // chunks
        rest = P - chunks * width
        return Cut(width, chunks, rest, chunks + (rest > 0), ((P, P),), True)
    line = LINE // itemsize
    width = next((w for w in range(longest, longest // 2, -4 * line) if P % w == 0), longest)
    chunks, rest = divmod(P, width)
    most = max(1, setting.SCRATCH // (T * width))
    per_block = -(-chunks // -(-chunks // most))  # the same number of blocks, of about equal size
    step = per_block * width
    # A gap of one line, because rows at a distance of a power of two compete for the same places in a cache.
    blocks = [(min(step, chunks * width - a), step + line) for a in range(0, chunks * width, step)]
    if rest:
        blocks.append((rest, rest))
    return Cut(width, chunks, rest, max(1, PARTIALS // T**2 // per_block) * per_block, tuple(blocks), False)


@lru_cache(maxsize=4096)
def even_width(T: int, P: int) -> int:
    """Return the least number of columns, at least P, that T rows in one block are cut into without a rest."""
    chunks, rest = cut(T, P, 4)[1:3]
    return P - P % -chunks if rest else P


def error_bound(T: int, P: int, dtype: torch.dtype) -> float:
    """Return the greatest error of an entry M_ij of a Gramian, as a share of sum_e |J_ie J_je|.

    It is (w + d + 1) u with u half a unit in the last place of the arithmetic: 2^-24 for float32, 2^-53 for float64.
    There are w - 1 additions in a chunk of w columns, in any order, and d = ceil(log2 n) in the tree over n products.
    Each product is rounded, and so is the result. (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1;
    the bound omits the square of w u.) It holds if nothing overflows or falls below the smallest normal number.

    Args:
        T: the number of rows.
        P: the number of columns.
        dtype: float32, or float64 for float64 rows.
    """
    of_columns = cut(T, P, dtype.itemsize)
    depth = max(0, of_columns.terms - 1).bit_length()
    return (max(of_columns.width, of_columns.rest) + depth + 1) * torch.finfo(dtype).eps / 2


def batch(rows: Tensor, width: int, count: int) -> Batch:
    """Return a view of the first ``count`` chunks of ``width`` columns; a single one is repeated, and counts once."""
    distance, copies = (width, count) if count > 1 else (0, 2)
    return rows.as_strided((copies, rows.shape[0], width), (distance, rows.stride(0), 1)), count


def batches_of(rows: Tensor, columns: int, cut: Cut) -> Iterator[Batch]:
    """Yield the chunks of the first ``columns`` columns of rows in scratch memory, then the rest."""
    whole, rest = divmod(columns, cut.width)
    if whole:
        yield batch(rows, cut.width, whole)
    if rest:
        yield batch(rows[:, whole * cut.width :], rest, 1)


@lru_cache(maxsize=256)
def tiles(T: int) -> tuple[tuple[slice, slice], ...]:
    """Return the tiles of M, each computed as one product: some rows by some columns, from the diagonal down.

    Half of M follows from the other half. With more columns per tile more of it is computed twice; with fewer, a BLAS
    does less work for each number it packs. By tiles 20 rows of a million take 0.6 times as long as in one product, 40
    rows 0.75 times, 48 to 64 rows as long.
    """
    step = 16 if T <= 32 else 32
    return tuple(
        (slice(top, min(top + MOST, T)), slice(left, min(left + step, T)))
        for left in range(0, T, step)
        for top in range(left, T, MOST)
    )
