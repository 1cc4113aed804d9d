"""Questions to the processor at hand, each asked once: what may be done faster and give the same bits?

Where the answer is no, the same bits come out of more memory traffic or more calls.
"""

from functools import lru_cache

import torch
from torch import Tensor

from gradkern.ops.chunks import LINE, Cut, batch, row_blocks

PAGE = 4096
"""Bytes after which addresses repeat themselves to a cache."""


def lies_as_scratch(J: Tensor, cut: Cut, work: torch.dtype) -> bool:
    """Whether J lies in memory as a block in scratch memory does, so that a copy would change nothing."""
    P = J.shape[1]
    return J.dtype == work and cut.step == P and J.stride() == (P, 1) and J.data_ptr() % LINE == 0


def in_place(J: Tensor, cut: Cut, work: torch.dtype) -> bool:
    """Whether products of J where it lies have the bits of products of a copy in scratch memory.

    Which numbers a BLAS adds in what order depends on no number that it adds. So random rows, as far apart and as far
    from a line's start as those of J, show whether the order is the same: if it is not, some sum has another last bit.
    """
    T, P = J.shape
    stride, column = J.stride()
    if cut.step == P or J.dtype != work or column != 1 or stride < P or not J.is_cpu:
        return False
    apart = stride % (PAGE // J.element_size())
    return _same_order(T, cut.width, J.dtype, J.data_ptr() % LINE, apart, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _same_order(T: int, width: int, dtype: torch.dtype, offset: int, apart: int, threads: int) -> bool:
    """Of rows whose distance is ``apart`` numbers more than some pages, ``offset`` bytes behind a line's start.

    ``threads`` is a key of the cache alone: the answer is the one for the present number of threads.
    """
    least = (T - row_blocks(T)[-1].start) ** 2
    count = 2 + 64 // least  # of so many sums all would not agree by chance
    generator = torch.Generator().manual_seed(0)  # the user's own must not move
    rows = torch.randn((T, count * width), generator=generator, dtype=dtype, device="cpu")
    page, line = PAGE // dtype.itemsize, LINE // dtype.itemsize
    stride = -(-rows.shape[1] // page) * page + apart
    memory = rows.new_empty(T * stride + line)
    start = (offset - memory.data_ptr()) % LINE // dtype.itemsize
    there = memory[start:].as_strided(rows.shape, (stride, 1)).copy_(rows)
    here = rows.new_empty((T, rows.shape[1] + line))[:, : rows.shape[1]].copy_(rows)
    return all(
        torch.equal(_products(there, width, count, left), _products(here, width, count, left)) for left in row_blocks(T)
    )


def _products(rows: Tensor, width: int, count: int, left: slice) -> Tensor:
    X, _ = batch(rows, width, count)
    return torch.bmm(X[:, left.start :], X[:, left].mT)


@lru_cache(maxsize=2)
def additions_agree(dtype: torch.dtype) -> bool:
    """Whether ``x.add_(y, alpha=a)`` gives an element the same bits wherever it lies in x.

    PyTorch works on whole vectors and ends with single elements, and each thread has an end of its own. Where the
    compiler rounds a multiplication and an addition together for vectors and not for single elements, the result would
    depend on the number of threads.
    """
    x, y = _two_rows(dtype)
    whole = x.add(y, alpha=0.7)
    return all(torch.equal(x[a : a + 1].add(y[a : a + 1], alpha=0.7)[0], whole[a]) for a in range(len(x)))


@lru_cache(maxsize=2)
def bags_agree(dtype: torch.dtype) -> bool:
    """Whether ``torch.embedding_bag`` adds up weighted rows as ``x.mul(a).add_(y, alpha=b)`` does."""
    rows = torch.stack(_two_rows(dtype))
    first, second = torch.tensor([0.3, 0.7], dtype=dtype, device="cpu").tolist()
    weights = torch.tensor([first, second], dtype=dtype, device="cpu")
    one_by_one = rows[0].mul(first).add_(rows[1], alpha=second)
    zeros = torch.zeros(1, dtype=torch.int64, device="cpu")
    bag = torch.embedding_bag(rows, torch.arange(2, device="cpu"), zeros, False, 0, False, weights)[0]
    return additions_agree(dtype) and torch.equal(bag[0], one_by_one)


def _two_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random numbers enough for some vectors and an end."""
    generator = torch.Generator().manual_seed(0)  # the user's own must not move
    x, y = torch.randn((2, 133), generator=generator, dtype=dtype, device="cpu")
    return x, y
