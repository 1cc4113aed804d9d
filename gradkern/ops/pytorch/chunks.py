"""The fixed shapes in which a BLAS is asked for products of rows, so that its answer is the same to the last bit.

In which order a BLAS sums up a product depends on its shape and strides, on where the rows lie relative to 64 bytes,
and on how many threads share the product. So a Gramian is put together from small products that are always alike:

- The columns are cut into chunks of equal width, and a rest, by T and P alone.
- Rows lie in memory that starts at a multiple of 64 bytes, as PyTorch's allocator gives it, and at a fixed distance;
  or where ``observed.py`` has found that this changes nothing.
- Products are computed in batches of two at least: a BLAS shares a product that comes alone among its threads. It may
  share those of a batch too, where they are fewer than the threads; ``observed.py`` finds out whether that changes
  anything, and if so, copies of each product make up the number.
- The T x T products are added up in a binary tree of element-wise additions, each of them rounded as IEEE 754 says
  (``products.py``).

What remains is a function of the numbers, T and P: it depends neither on addresses, nor on gaps between rows, nor on
whether rows come as a matrix or as a list of tensors, nor on the number of threads, nor on the load of the machine.
Another processor, instruction set or BLAS may give other bits, within the bound of :func:`error_bound`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 2048
"""Columns of a chunk at most: the length of a sum whose order is the BLAS's. The error of the sum grows with it, the
number of T x T products falls: of chunks half as long two rows of a million take a seventh longer, forty no longer."""
LINE = 64
"""Bytes of a cache line."""
PARTIALS = 1 << 21
"""Numbers of the T x T products that wait to be added, 8 MB of float32."""
SCRATCH = 1 << 19
"""Numbers of a block of scratch memory, all rows together: 2 MB of float32, what a core's second cache holds. Half or
twice as many took a tenth longer."""
MOST = 64
"""Rows of a product at most: of more a BLAS would give each of many threads a part."""

Batch = tuple[Tensor, int]
"""Chunks, (k, T, width) with k >= 2, and how many of them count."""


class Cut(NamedTuple):
    """The chunks into which the columns of some rows are cut, and the blocks in which these come to scratch memory."""

    width: int
    """Columns of a chunk."""
    chunks: int
    """Number of chunks."""
    rest: int
    """Columns that are left."""
    group: int
    """Products that wait to be added: those of whole blocks."""
    blocks: tuple[tuple[int, int], ...]
    """Blocks of scratch memory, one after another: how many columns they hold, and how far apart rows are."""

    @property
    def at_once(self) -> bool:
        """Whether all columns come in one block, as a contiguous matrix."""
        columns, stride = self.blocks[0]
        return columns == stride

    @property
    def terms(self) -> int:
        """Number of products."""
        return self.chunks + (self.rest > 0)


@lru_cache(maxsize=4096)
def cut(T: int, P: int, itemsize: int) -> Cut:
    """The cut of T rows of P numbers, ``itemsize`` bytes each in arithmetic."""
    if T * P <= SCRATCH or P <= 2 * LONGEST:  # all in one block, as a contiguous matrix
        least = max(2, -(-P // LONGEST)) if P > 1 else 1
        chunks = next((n for n in range(least, 2 * least) if P % n == 0), least)
        width = P // chunks
        rest = P - chunks * width
        return Cut(width, chunks, rest, chunks + (rest > 0), ((P, P),))
    line = LINE // itemsize
    width = next((w for w in range(LONGEST, LONGEST // 2, -4 * line) if P % w == 0), LONGEST)
    chunks, rest = divmod(P, width)
    most = max(1, SCRATCH // (T * width))
    per_block = -(-chunks // -(-chunks // most))  # as many blocks, all of about the same size
    step = per_block * width
    # Rows that are a power of two apart would compete for the same places in a cache: one line is left between them.
    blocks = [(min(step, chunks * width - a), step + line) for a in range(0, chunks * width, step)]
    if rest:
        blocks.append((rest, rest))
    return Cut(width, chunks, rest, max(1, PARTIALS // T**2 // per_block) * per_block, tuple(blocks))


def error_bound(T: int, P: int, dtype: torch.dtype) -> float:
    """How far an entry of a Gramian may be from the true M_ij, as a share of sum_e |J_ie J_je|.

    (w + d + 1) u with u half a unit in the last place of the arithmetic: 2^-24 for float32, 2^-53 for float64. There
    are w - 1 additions in a chunk of w columns, in whatever order, and d = ceil(log2 n) in the tree over n products;
    each product is rounded, and so is the result. (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1;
    the square of w u is left out.) It holds where nothing overflows or falls below the smallest normal number.

    Args:
        T: number of rows.
        P: number of columns.
        dtype: float32, or float64 for float64 rows.
    """
    of_all = cut(T, P, dtype.itemsize)
    depth = max(0, of_all.terms - 1).bit_length()
    return (max(of_all.width, of_all.rest) + depth + 1) * torch.finfo(dtype).eps / 2


def batch(rows: Tensor, width: int, count: int) -> Batch:
    """The first ``count`` chunks of ``width`` columns, where they lie; one alone comes twice, and counts once."""
    apart, copies = (width, count) if count > 1 else (0, 2)
    return rows.as_strided((copies, len(rows), width), (apart, rows.stride(0), 1)), count


def batches_of(rows: Tensor, columns: int, cut: Cut) -> Iterator[Batch]:
    """The chunks of the first ``columns`` columns of rows in scratch memory; what is less than a chunk is the rest."""
    whole, rest = divmod(columns, cut.width)
    if whole:
        yield batch(rows, cut.width, whole)
    if rest:
        yield batch(rows[:, whole * cut.width :], rest, 1)


@lru_cache(maxsize=256)
def tiles(T: int) -> tuple[tuple[slice, slice], ...]:
    """The parts of M that are products of their own: some rows by some columns, from the diagonal down.

    Half of M is known from the other half. Of more columns at a time more is computed twice, while fewer leave a BLAS
    less to do for each number it packs: by tiles 20 rows of a million take 0.6 times as long as in one product, 40 rows
    0.75 times, 48 to 64 rows as long.
    """
    step = 16 if T <= 32 else 32
    return tuple(
        (slice(top, min(top + MOST, T)), slice(left, min(left + step, T)))
        for left in range(0, T, step)
        for top in range(left, T, MOST)
    )
