"""Questions to the processor at hand, each asked once: what may be done faster and give the same bits?

Where the answer is no, the same bits come out of more memory traffic or more calls.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor

from gradkern.ops.pytorch.chunks import LINE, Cut, batch, tiles

PAGE = 4096
"""Bytes after which addresses repeat themselves to a cache."""
LONGEST_STRIDE = 2**31 - 1
"""From one row to the next, in elements: what every BLAS counts."""
ENOUGH = 64
"""Random sums to compare: so many have the same last bits only if they were summed up in the same order."""


def lies_as_scratch(J: Tensor, cut: Cut, work: torch.dtype) -> bool:
    """Whether J lies in memory as a block in scratch memory does, so that a copy would change nothing."""
    P = J.shape[1]
    return J.dtype == work and cut.at_once and J.stride() == (P, 1) and J.data_ptr() % LINE == 0


def in_place(J: Tensor, cut: Cut, work: torch.dtype) -> bool:
    """Whether products of J where it lies have the bits of products of a copy in scratch memory.

    In which order a BLAS adds numbers depends on none of them. So random rows, as far from a line's start as those of J
    and as far apart but for some pages, show whether the order is the same: if it is not, some sum has another last
    bit. Distances of more than a BLAS counts in 32 bits may send it another way, and are not asked about.
    """
    T, P = J.shape
    stride, column = J.stride()
    if cut.at_once or J.dtype != work or column != 1 or not P <= stride <= LONGEST_STRIDE or not J.is_cpu:
        return False
    apart = stride % (PAGE // J.element_size())
    return _same_order(T, cut.width, J.dtype, J.data_ptr() % LINE, apart, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _same_order(T: int, width: int, dtype: torch.dtype, offset: int, apart: int, threads: int) -> bool:
    """Whether rows of unit stride are summed up in the same order as in scratch memory.

    They start ``offset`` bytes behind a line's start, and their distance is ``apart`` numbers more than some pages.
    ``threads`` is a key of the cache alone: the answer is the one for the present number of threads.
    """
    count = 2 + ENOUGH // min((rows.stop - rows.start) * (left.stop - left.start) for rows, left in tiles(T))
    rows = _random_rows(T, count * width, dtype)
    page, line = PAGE // dtype.itemsize, LINE // dtype.itemsize
    stride = -(-rows.shape[1] // page) * page + apart
    memory = rows.new_empty(T * stride + line)
    start = (offset - memory.data_ptr()) % LINE // dtype.itemsize
    there = memory[start:].as_strided(rows.shape, (stride, 1)).copy_(rows)
    here = rows.new_empty((T, rows.shape[1] + line))[:, : rows.shape[1]].copy_(rows)
    X, Y = batch(there, width, count)[0], batch(here, width, count)[0]
    return all(
        torch.equal(products_of(X[:, some], X[:, others]), products_of(Y[:, some], Y[:, others]))
        for some, others in tiles(T)
    )


def products_of(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """A Bᵀ of each chunk, (k, m, n), as it comes out among many; A is (k, m, width), B (k, n, width)."""
    k, m, width = A.shape
    threads = torch.get_num_threads()
    if k >= threads or not A.is_cpu or _not_shared(k, m, B.shape[1], width, A.dtype, threads):
        return torch.bmm(A, B.mT, out=out)
    products = torch.stack([_among_many(a, b, threads) for a, b in zip(A, B, strict=True)])
    return products if out is None else out.copy_(products)


@lru_cache(maxsize=4096)
def _not_shared(k: int, m: int, n: int, width: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether a product has the bits in a batch of k that it has among as many as there are threads.

    Where products are fewer than threads, a BLAS may give several threads a part of the same one, and sum up what lies
    at the edges in another order.
    """
    trials = 1 + ENOUGH // (k * m * n)
    A, _ = batch(_random_rows(m + n, trials * k * width, dtype), width, trials * k)
    for X in A.split(k):
        among_few = torch.bmm(X[:, :m], X[:, m:].mT)
        if not all(torch.equal(p, _among_many(x[:m], x[m:], threads)) for p, x in zip(among_few, X, strict=True)):
            return False
    return True


def _among_many(a: Tensor, b: Tensor, threads: int) -> Tensor:
    """The product of a chunk's rows with others, in a batch of as many as there are threads, all alike."""
    copies = (threads, -1, -1)
    return torch.bmm(a.expand(copies), b.mT.expand(copies))[0]


@cache
def additions_agree(dtype: torch.dtype) -> bool:
    """Whether ``x.add_(y, alpha=a)`` gives an element the same bits wherever it lies in x, a number or a tensor.

    PyTorch works on whole vectors and ends with single elements, and each thread has an end of its own. Where the
    compiler rounds a multiplication and an addition together for vectors and not for single elements, the result would
    depend on the number of threads.
    """
    x, y = _random_rows(2, 133, dtype)  # some vectors and an end
    return all(
        torch.equal(torch.cat([first[a : a + 1].add(y[a : a + 1], alpha=0.7) for a in range(len(y))]), whole)
        for first, whole in ((x, x.add(y, alpha=0.7)), (torch.zeros_like(x), x.new_zeros(()).add(y, alpha=0.7)))
    )


@cache
def bags_agree(dtype: torch.dtype) -> bool:
    """Whether ``torch.embedding_bag`` adds up weighted rows one by one, as ``add`` with ``alpha=`` does."""
    rows = _random_rows(5, 133, dtype)
    weights = _random_rows(1, 5, dtype)[0]
    one_by_one = rows.new_zeros(())
    for row, weight in zip(rows, weights.tolist(), strict=True):
        one_by_one = one_by_one.add(row, alpha=weight)
    start = torch.zeros(1, dtype=torch.int64, device="cpu")
    bag = torch.embedding_bag(rows, torch.arange(5, device="cpu"), start, False, 0, False, weights)[0]
    return additions_agree(dtype) and torch.equal(bag[0], one_by_one)


def _random_rows(T: int, P: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the user's own must not move
    return torch.randn((T, P), generator=generator, dtype=dtype, device="cpu")
