"""Gramians in plain PyTorch: how rows get into the chunks of ``chunks.py``, and how their products are added up.

A skinny product J Jᵀ leaves most of the memory bandwidth unused, because a matrix multiply is cut along its output,
which here is only T x T. So the columns are cut into chunks. A matrix is read where it lies if that changes no bit, and
else copied a block at a time; gradients of several tensors are gathered in the same blocks, and chunks run on across
tensors. Blocks stay in cache until they have been worked on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.ops.blocks import Columns, Erase, Scratch, flat, gathered
from gradkern.ops.chunks import Batch, Cut, batch, batches_of, cut, tiles
from gradkern.ops.observed import in_place, lies_as_scratch, products_of
from gradkern.ops.schema import arithmetic_dtype, sample


def matrix_gramian(J: Tensor) -> Tensor:
    """J Jᵀ, (T, T)."""
    T, P = J.shape
    wanted = arithmetic_dtype(J.dtype)
    if P == 0:
        return J.new_zeros((T, T), dtype=wanted)
    work = work_dtype(J)
    of_all = cut(T, P, work.itemsize)
    M = sum_of_products(_matrix_batches(J, of_all, work), T, of_all)
    return M.to(J.device, wanted)


def _matrix_batches(J: Tensor, cut: Cut, work: torch.dtype) -> Iterator[Batch]:
    """Chunks of J where they lie if that changes no bit, and all others by way of scratch memory."""
    if lies_as_scratch(J, cut, work):
        yield from batches_of(J, J.shape[1], cut)
    elif in_place(J, cut, work):
        for a in range(0, cut.chunks, cut.group):
            yield batch(J[:, a * cut.width :], cut.width, min(cut.group, cut.chunks - a))
        if cut.rest:
            rest = J[:, -cut.rest :].clone(memory_format=torch.contiguous_format)
            yield batch(rest, cut.rest, 1)
    else:
        for rows, columns in copied(J, cut, work):
            yield from batches_of(rows, columns, cut)


def copied(J: Tensor, cut: Cut, work: torch.dtype) -> Iterator[tuple[Tensor, int]]:
    """Blocks of J in scratch memory, each in the place of the last one, and how many columns they hold."""
    T = len(J)
    memory = J.new_empty(T * cut.blocks[0][1], dtype=work)
    done = 0
    for columns, stride in cut.blocks:
        rows = memory[: T * stride].view(T, stride)
        rows[:, :columns].copy_(J[:, done : done + columns])
        yield rows, columns
        done += columns


def segment_gramians(
    grads: Sequence[Tensor | None], segments: Sequence[int], n_segments: int, erase: Erase | None = None
) -> Tensor:
    """(n_segments, T, T), J Jᵀ of the rows that the tensors of each segment form, of what ``erase`` leaves."""
    n = len(segments)
    like = sample(grads)
    members: dict[int, dict[int, Sequence[Tensor | None]]] = defaultdict(dict)
    for k, s in enumerate(segments):
        column = grads[k::n]
        if any(g is not None and g.numel() for g in column):
            members[s][k] = [None if g is None else flat(g) for g in column]
    work = work_dtype(like)
    scratch = Scratch(like, work)
    M = like.new_zeros((n_segments, len(grads) // n, len(grads) // n), dtype=arithmetic_dtype(like.dtype))
    for s, columns in members.items():
        M[s] = _tensors_gramian(columns, scratch, work, erase)
    return M


def _tensors_gramian(columns: Columns, scratch: Scratch, work: torch.dtype, erase: Erase | None) -> Tensor:
    T = len(next(iter(columns.values())))
    P = sum(next(len(g) for g in column if g is not None) for column in columns.values())
    of_all = cut(T, P, work.itemsize)
    blocks = gathered(columns, scratch, of_all.blocks, erase)
    return sum_of_products((b for rows, n in blocks for b in batches_of(rows, n, of_all)), T, of_all)


def sum_of_products(batches: Iterator[Batch], T: int, cut: Cut) -> Tensor:
    """Σ X Xᵀ over all chunks X, (T, T), on the CPU."""
    of_M = tiles(T)
    first, counted = next(batches)
    if counted == cut.terms and len(of_M) == 1:
        products = products_of(first, first)
        return _symmetric(_tree(products if counted > 1 else products[:1]))
    totals: list[list[Tensor]] = [[] for _ in of_M]
    for group in _groups(chain([(first, counted)], batches), of_M, cut):
        for of_tile, products in zip(totals, group, strict=True):
            of_tile.append(_tree(products))
    M = torch.empty((T, T), dtype=first.dtype, device="cpu")
    for (rows, columns), of_tile in zip(of_M, totals, strict=True):
        total = of_tile[0] if len(of_tile) == 1 else _tree(torch.stack(of_tile))
        M[columns, rows] = total.mT
        M[rows, columns] = total
        if rows.start == columns.start:
            M[columns, columns] = _symmetric(total[: _length(columns)])
    return M


def _symmetric(M: Tensor) -> Tensor:
    """M with what is below its diagonal above it too: a BLAS may sum up the two in other orders."""
    below = M.numpy()
    above = _above(len(M))
    below[above] = below.T[above]
    return M


@lru_cache(maxsize=64)
def _above(n: int) -> tuple[NDArray[np.intp], ...]:
    """The places above the diagonal of n rows."""
    return np.triu_indices(n, 1)


def _groups(batches: Iterable[Batch], of_M: Sequence[tuple[slice, slice]], cut: Cut) -> Iterator[list[Tensor]]:
    """For each tile of M the products of a group of chunks, in memory that the next group overwrites."""
    group = min(cut.group, cut.terms)
    room: list[Tensor] = []
    filled = 0
    for X, counted in batches:
        room = room or [X.new_empty((group + 1, _length(rows), _length(columns))) for rows, columns in of_M]
        for products, (rows, columns) in zip(room, of_M, strict=True):
            products_of(X[:, rows], X[:, columns], products[filled : filled + len(X)])
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
    left = terms.numpy(force=True)
    with np.errstate(all="ignore"):  # gradients that have overflowed are for the gradient scaler to find
        while (n := len(left)) > 1:
            half = (n + 1) // 2
            first = left[: n - half]
            np.add(first, left[half:], out=first)
            left = left[:half]
    return torch.from_numpy(left[0].copy())


def _length(part: slice) -> int:
    return part.stop - part.start


def work_dtype(rows: Tensor) -> torch.dtype:
    """What the products are computed in. Where the user lets matrix products round to bfloat16 or TF32, float64:
    that setting is global, so it could not be turned off here without touching other threads' products.
    """
    if rows.dtype == torch.float64:
        return torch.float64
    setting = _matmul_precision("mkldnn" if rows.device.type == "cpu" else "cuda", "matmul")
    return torch.float32 if setting in ("none", "ieee") else torch.float64


# What ``torch.backends.mkldnn.matmul.fp32_precision`` reads; through all its properties that costs 1 µs a call.
_matmul_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
