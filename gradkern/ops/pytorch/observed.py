"""Tests of the processor at hand, each run once: they show whether faster operations give the same bits.

If they do not, the same bits cost more memory traffic or more calls.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor

from gradkern.ops.pytorch.chunks import LINE, Cut, batch, tiles

PAGE = 4096
"""The number of bytes after which a cache maps addresses to the same places again."""
LONGEST_STRIDE = 2**31 - 1
"""The greatest distance of rows, in elements, that every BLAS can count."""
ENOUGH = 64
"""The number of random sums to compare: so many agree in all bits only if the order of summation is the same."""


def lies_as_scratch(J: Tensor, cut: Cut, dtype: torch.dtype) -> bool:
    """Return whether J has the layout of a block in scratch memory, so that a copy would change nothing."""
    P = J.shape[1]
    return J.dtype == dtype and cut.at_once and J.stride() == (P, 1) and J.data_ptr() % LINE == 0


def in_place(J: Tensor, cut: Cut, dtype: torch.dtype) -> bool:
    """Return whether products of J in place have the same bits as products of a copy in scratch memory.

    The order in which a BLAS adds numbers does not depend on the numbers. So random rows show whether the order is the
    same: if it is not, some sum has another last bit. They have the offset of J's rows in a cache line, and the same
    distance but for some pages. For distances beyond 32 bits a BLAS may use another order; these are not tested.
    """
    T, P = J.shape
    stride, column = J.stride()
    if cut.at_once or J.dtype != dtype or column != 1 or not P <= stride <= LONGEST_STRIDE or not J.is_cpu:
        return False
    distance = stride % (PAGE // J.element_size())
    return _same_order(T, cut.width, J.dtype, J.data_ptr() % LINE, distance, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _same_order(T: int, width: int, dtype: torch.dtype, offset: int, distance: int, threads: int) -> bool:
    """Return whether rows of unit stride are summed up in the same order as in scratch memory.

    They start ``offset`` bytes after the start of a line, and their distance is ``distance`` numbers more than some
    pages. ``threads`` only serves as a key of the cache: the result holds for the current number of threads.
    """
    count = 2 + ENOUGH // min((rows.stop - rows.start) * (left.stop - left.start) for rows, left in tiles(T))
    rows = _random_rows(T, count * width, dtype)
    page, line = PAGE // dtype.itemsize, LINE // dtype.itemsize
    stride = -(-rows.shape[1] // page) * page + distance
    memory = rows.new_empty(T * stride + line)
    start = (offset - memory.data_ptr()) % LINE // dtype.itemsize
    at_offset = memory[start:].as_strided(rows.shape, (stride, 1)).copy_(rows)
    in_scratch = rows.new_empty((T, rows.shape[1] + line))[:, : rows.shape[1]].copy_(rows)
    X, Y = batch(at_offset, width, count)[0], batch(in_scratch, width, count)[0]
    return all(
        torch.equal(products_of(X[:, some], X[:, others]), products_of(Y[:, some], Y[:, others]))
        for some, others in tiles(T)
    )


def products_of(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute A Bᵀ of each chunk, (k, m, n), with the bits of a large batch; A is (k, m, width), B (k, n, width)."""
    k, m, width = A.shape
    threads = torch.get_num_threads()
    if k >= threads or not A.is_cpu or _not_shared(k, m, B.shape[1], width, A.dtype, threads):
        return torch.bmm(A, B.mT, out=out)
    products = torch.stack([_among_many(a, b, threads) for a, b in zip(A, B, strict=True)])
    return products if out is None else out.copy_(products)


@lru_cache(maxsize=4096)
def _not_shared(k: int, m: int, n: int, width: int, dtype: torch.dtype, threads: int) -> bool:
    """Return whether a product in a batch of k has the same bits as in a batch with one product for each thread.

    If there are fewer products than threads, a BLAS may split a product among several threads, and sum up its edges in
    another order.
    """
    trials = 1 + ENOUGH // (k * m * n)
    A, _ = batch(_random_rows(m + n, trials * k * width, dtype), width, trials * k)
    for X in A.split(k):
        among_few = torch.bmm(X[:, :m], X[:, m:].mT)
        if not all(torch.equal(p, _among_many(x[:m], x[m:], threads)) for p, x in zip(among_few, X, strict=True)):
            return False
    return True


def _among_many(a: Tensor, b: Tensor, threads: int) -> Tensor:
    """Compute a bᵀ in a batch of equal products, one for each thread."""
    copies = (threads, -1, -1)
    return torch.bmm(a.expand(copies), b.mT.expand(copies))[0]


@cache
def additions_agree(dtype: torch.dtype) -> bool:
    """Return whether ``x.add_(y, alpha=a)`` gives an element the same bits at any position; x is a number or a tensor.

    PyTorch processes whole vectors and then single elements, and each thread has such an end. If the compiler fuses
    multiplication and addition for vectors but not for single elements, the result depends on the number of threads.
    """
    x, y = _random_rows(2, 133, dtype)  # some vectors and an end
    return all(
        torch.equal(torch.cat([first[a : a + 1].add(y[a : a + 1], alpha=0.7) for a in range(len(y))]), whole)
        for first, whole in ((x, x.add(y, alpha=0.7)), (torch.zeros_like(x), x.new_zeros(()).add(y, alpha=0.7)))
    )


@cache
def bags_agree(dtype: torch.dtype) -> bool:
    """Return whether ``torch.embedding_bag`` adds up weighted rows one by one, as ``add`` with ``alpha=`` does."""
    rows = _random_rows(5, 133, dtype)
    weights = _random_rows(1, 5, dtype)[0]
    one_by_one = rows.new_zeros(())
    for row, weight in zip(rows, weights.tolist(), strict=True):
        one_by_one = one_by_one.add(row, alpha=weight)
    start = torch.zeros(1, dtype=torch.int64, device="cpu")
    bag = torch.embedding_bag(rows, torch.arange(5, device="cpu"), start, False, 0, False, weights)[0]
    return additions_agree(dtype) and torch.equal(bag[0], one_by_one)


def _random_rows(T: int, P: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # it leaves the user's generator alone
    return torch.randn((T, P), generator=generator, dtype=dtype, device="cpu")
