"""The fixed shapes in which a BLAS is asked for products of rows, so that its answer is the same to the last bit.

In which order a BLAS sums up a product depends on its shape and strides, on where the rows lie relative to 64 bytes,
and on how many threads share the product. So a Gramian is put together from small products that are always alike:

- The columns are cut into chunks of equal width, and a rest, by T and P alone.
- Rows lie in memory that starts at a multiple of 64 bytes, as PyTorch's allocator gives it, and at a fixed distance.
- Products are computed in batches of two at least. A BLAS gives each product of a batch to one thread. (It shares a
  product that comes alone, so none does.)
- The T x T products are added up in a binary tree of element-wise additions, each of them rounded as IEEE 754 says.

What remains is a function of the numbers, T and P: it depends neither on addresses, nor on gaps between rows, nor on
whether rows come as a matrix or as a list of tensors, nor on the number of threads, nor on the load of the machine.
Another processor, instruction set or BLAS may give other bits, within the bound of :func:`error_bound`.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LONGEST = 2048
"""Columns of a chunk at most: the length of a sum whose order is the BLAS's. The error of the sum grows with it, the
number of T x T products falls: of chunks half as long two rows of a million take a seventh longer, forty no longer."""
LINE = 64
"""Bytes of a cache line."""
PARTIALS = 1 << 21
"""Numbers of the T x T products that wait to be added, 8 MB of float32."""
BLOCK = 1 << 19
"""Numbers of a block of scratch memory, all rows together: 2 MB of float32, what a core's second cache holds. Half or
twice as many took a tenth longer."""

Batch = tuple[Tensor, int]
"""Chunks, (k, T, width) with k >= 2, and how many of them count."""


class Cut(NamedTuple):
    """How the P columns of T rows are cut."""

    width: int
    """Columns of a chunk."""
    chunks: int
    """Number of chunks."""
    rest: int
    """Columns that are left."""
    step: int
    """Columns of a block of scratch memory: whole chunks."""
    group: int
    """Products that wait to be added: those of whole blocks."""
    blocks: tuple[tuple[int, int], ...]
    """Blocks of scratch memory, one after another: how many columns they hold, and how far apart rows are."""

    @property
    def terms(self) -> int:
        """Number of products."""
        return self.chunks + (self.rest > 0)


@lru_cache(maxsize=4096)
def cut(T: int, P: int, itemsize: int) -> Cut:
    """The cut of T rows of P numbers, ``itemsize`` bytes each in arithmetic."""
    if T * P <= BLOCK or P <= 2 * LONGEST:  # all in one block, as a contiguous matrix
        least = max(2, -(-P // LONGEST)) if P > 1 else 1
        chunks = next((n for n in range(least, 2 * least) if P % n == 0), least)
        width = P // chunks
        rest = P - chunks * width
        return Cut(width, chunks, rest, P, chunks + (rest > 0), ((P, P),))
    line = LINE // itemsize
    width = next((w for w in range(LONGEST, LONGEST // 2, -4 * line) if P % w == 0), LONGEST)
    chunks, rest = divmod(P, width)
    most = max(1, BLOCK // (T * width))
    per_block = -(-chunks // -(-chunks // most))  # as many blocks, all of about the same size
    step = per_block * width
    # Rows that are a power of two apart would compete for the same places in a cache: one line is left between them.
    blocks = [(min(step, chunks * width - a), step + line) for a in range(0, chunks * width, step)]
    if rest:
        blocks.append((rest, rest))
    return Cut(width, chunks, rest, step, max(1, PARTIALS // T**2 // per_block) * per_block, tuple(blocks))


def error_bound(T: int, P: int, dtype: torch.dtype) -> float:
    """How far an entry of a Gramian may be from the true M_ij, as a share of sum_e |J_ie J_je|.

    (w + d + 1) u with u half a unit in the last place of the arithmetic: 2^-24 for float32, 2^-53 for float64. There
    are w - 1 additions in a chunk of w columns, in whatever order, and d = ceil(log2 n) in the tree over n products;
    each product is rounded, and so is the result. (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1;
    the square of w u is left out.)

    Args:
        T: number of rows.
        P: number of columns.
        dtype: what the products are computed in, float32 or float64.
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


def row_blocks(T: int) -> list[slice]:
    """Rows that are multiplied with themselves and those after them: half of M is known from the other half.

    Of more rows at a time more is computed twice, while fewer leave a BLAS less to do for each number it packs. In
    blocks 20 rows of a million take 0.6 times as long as in one, 40 rows 0.75 times, 48 to 64 rows as long.
    """
    step = 16 if T <= 32 else 32
    return [slice(a, min(a + step, T)) for a in range(0, T, step)]


def sum_of_products(batches: Iterator[Batch], T: int, cut: Cut) -> Tensor:
    """Σ X Xᵀ over all chunks X, (T, T), on the CPU."""
    lefts = row_blocks(T)
    first, counted = next(batches)
    if counted == cut.terms and len(lefts) == 1:
        products = torch.bmm(first, first.mT)
        return _tree(products if counted > 1 else products[:1])
    totals: list[list[Tensor]] = [[] for _ in lefts]
    for group in _groups(chain([(first, counted)], batches), lefts, T, cut):
        for of_left, product in zip(totals, group, strict=True):
            of_left.append(_tree(product))
    return _symmetric(lefts, [t[0] if len(t) == 1 else _tree(torch.stack(t)) for t in totals])


def _groups(batches: Iterable[Batch], lefts: list[slice], T: int, cut: Cut) -> Iterator[list[Tensor]]:
    """For each block of rows the products of a group of chunks, in memory that the next group overwrites."""
    group = min(cut.group, cut.terms)
    room: list[Tensor] = []
    filled = 0
    for X, counted in batches:
        room = room or [X.new_empty((group + 1, T - left.start, left.stop - left.start)) for left in lefts]
        for products, left in zip(room, lefts, strict=True):
            torch.bmm(X[:, left.start :], X[:, left].mT, out=products[filled : filled + len(X)])
        filled += counted
        if filled == group:
            yield [products[:filled] for products in room]
            filled = 0
    if filled:
        yield [products[:filled] for products in room]


def _tree(terms: Tensor) -> Tensor:
    """The sum of ``terms``, which it overwrites, on the CPU: the second half is added to the first until one is left.

    In NumPy, whose calls take a third of the time of PyTorch's.
    """
    left = terms.cpu().numpy()
    with np.errstate(all="ignore"):  # gradients that have overflowed are for the gradient scaler to find
        while (n := len(left)) > 1:
            half = (n + 1) // 2
            first = left[: n - half]
            np.add(first, left[half:], out=first)
            left = left[:half]
    return torch.from_numpy(left[0].copy())


def _symmetric(lefts: list[slice], products: list[Tensor]) -> Tensor:
    """M, of which ``products`` holds the columns ``lefts`` from the diagonal down."""
    if len(lefts) == 1:
        return products[0]
    T = len(products[0])
    M = products[0].new_empty((T, T))
    for left, product in zip(lefts, products, strict=True):
        M[left, left.start :] = product.mT
        M[left.start :, left] = product
    return M
