"""Gramians in PyTorch: rows are cut into the chunks of ``chunks.py``, and the chunks' products are added up.

A skinny product J Jᵀ leaves most of the memory bandwidth unused, because a matrix multiply is cut along its output,
which here is only T x T. So the columns are cut into chunks. A matrix is read in place if that changes no bit, and
otherwise copied a block at a time. Gradients of several tensors are gathered into the same blocks, and chunks continue
across tensors. Blocks stay in cache until they have been processed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import Mask, OptionalTensors, TaskGrads, numels, sample
from gradkern.ops.devices import GPU
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.offsets import column_bounds
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import Columns, Erase, Scratch, flat, gathered
from gradkern.ops.pytorch.chunks import Batch, Cut, batch, batches_of, cut, tiles
from gradkern.ops.pytorch.drops import Drops
from gradkern.ops.pytorch.observed import in_place, lies_as_scratch, products_of

Floats = NDArray[np.floating[Any]]


@implements(operators.gramian)
def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute M = J Jᵀ, per segment."""
    if offsets is None:
        return matrix_gramian(J)
    bounds = column_bounds(offsets, J.shape[1])
    return torch.stack([matrix_gramian(J[:, a:b]) for a, b in pairwise(bounds)])


@implements(operators.gramian_tensors)
def gramian_tensors(rows: TaskGrads, mask: Mask | None = None) -> Tensor:
    """Compute M = J Jᵀ, per segment; the rows of J are the concatenated tensors of the segment."""
    drops = None if mask is None else Drops(mask, numels(rows.grads, len(rows.segments)))
    T, like = rows.n_tasks, sample(rows.grads)
    members: dict[int, dict[int, Sequence[Tensor | None]]] = defaultdict(dict)
    for k, s in enumerate(rows.segments):
        column = rows.column(k)
        if any(g is not None and g.numel() for g in column):
            members[s][k] = [None if g is None else flat(g) for g in column]
    dtype = compute_dtype(like)
    scratch = Scratch(like, dtype)
    M = like.new_zeros((rows.n_segments, T, T), dtype=arithmetic_dtype(like.dtype))
    for s, columns in members.items():
        M[s] = _tensors_gramian(columns, scratch, dtype, None if drops is None else drops.erase)
    return M


@implements(operators.cross)
def cross(A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute A Bᵀ, per segment: a corner of the Gramian of both matrices' rows, which any back end may compute."""
    bounds = column_bounds(offsets, A.shape[1])
    pieces = [row[a:b] for row in (*A, *B) for a, b in pairwise(bounds)]
    n_segments = len(bounds) - 1
    M = operators.gramian_tensors(TaskGrads(pieces, list(range(n_segments)), n_segments), None)
    K = M[:, : len(A), len(A) :].contiguous()
    return K[0] if offsets is None else K


@implements(operators.cross_tensors)
def cross_tensors(rows: TaskGrads, others: OptionalTensors, mask: Mask | None = None) -> Tensor:
    """Compute the dot products of rows and others, per segment: a corner of the Gramian of both.

    It serves the Triton back end too, which has a kernel for that Gramian and none for its corner.
    """
    both = TaskGrads([*rows.grads, *others], rows.segments, rows.n_segments)
    return operators.gramian_tensors(both, mask)[:, : rows.n_tasks, rows.n_tasks :].contiguous()


def matrix_gramian(J: Tensor) -> Tensor:
    """Compute J Jᵀ, (T, T)."""
    T, P = J.shape
    result_dtype = arithmetic_dtype(J.dtype)
    if P == 0:
        return J.new_zeros((T, T), dtype=result_dtype)
    dtype = compute_dtype(J)
    of_columns = cut(T, P, dtype.itemsize)
    M = sum_of_products(_matrix_batches(J, of_columns, dtype), T, of_columns)
    return M.to(J.device, result_dtype)


def _matrix_batches(J: Tensor, cut: Cut, dtype: torch.dtype) -> Iterator[Batch]:
    """Yield the chunks of J, in place if that changes no bit, otherwise copied to scratch memory."""
    if lies_as_scratch(J, cut, dtype):
        yield from batches_of(J, J.shape[1], cut)
    elif in_place(J, cut, dtype):
        for a in range(0, cut.chunks, cut.group):
            yield batch(J[:, a * cut.width :], cut.width, min(cut.group, cut.chunks - a))
        if cut.rest:
            rest = J[:, -cut.rest :].clone(memory_format=torch.contiguous_format)
            yield batch(rest, cut.rest, 1)
    else:
        for rows, columns in copied(J, cut, dtype):
            yield from batches_of(rows, columns, cut)


def copied(J: Tensor, cut: Cut, dtype: torch.dtype) -> Iterator[tuple[Tensor, int]]:
    """Yield blocks of J in scratch memory, each of which overwrites the last, and their numbers of columns."""
    T = len(J)
    memory = J.new_empty(T * cut.blocks[0][1], dtype=dtype)
    done = 0
    for columns, stride in cut.blocks:
        rows = memory[: T * stride].view(T, stride)
        rows[:, :columns].copy_(J[:, done : done + columns])
        yield rows, columns
        done += columns


def _tensors_gramian(columns: Columns, scratch: Scratch, dtype: torch.dtype, erase: Erase | None) -> Tensor:
    T = len(next(iter(columns.values())))
    P = sum(next(len(g) for g in column if g is not None) for column in columns.values())
    of_columns = cut(T, P, dtype.itemsize)
    blocks = gathered(columns, scratch, of_columns.blocks, erase)
    return sum_of_products((b for rows, n in blocks for b in batches_of(rows, n, of_columns)), T, of_columns)


def sum_of_products(batches: Iterator[Batch], T: int, cut: Cut) -> Tensor:
    """Return Σ X Xᵀ over all chunks X, (T, T), on the CPU."""
    of_M = tiles(T)
    if cut.at_once and len(of_M) == 1:  # a small matrix, whose time goes into calls
        terms = [products_of(X, X).numpy(force=True)[:counted] for X, counted in batches]
        return torch.from_numpy(_symmetric(_tree(terms[0] if len(terms) == 1 else np.concatenate(terms))))
    totals: list[list[Floats]] = [[] for _ in of_M]
    for group in _groups(batches, of_M, cut):
        for of_tile, products in zip(totals, group, strict=True):
            of_tile.append(_tree(products.numpy(force=True)).copy())
    M = np.empty((T, T), totals[0][0].dtype)
    for (rows, columns), of_tile in zip(of_M, totals, strict=True):
        total = of_tile[0] if len(of_tile) == 1 else _tree(np.stack(of_tile))
        M[columns, rows] = total.T
        M[rows, columns] = total
        if rows.start == columns.start:
            M[columns, columns] = _symmetric(total[: _length(columns)])
    return torch.from_numpy(M)


def _groups(batches: Iterable[Batch], of_M: Sequence[tuple[slice, slice]], cut: Cut) -> Iterator[list[Tensor]]:
    """Yield for each group of chunks the products for each tile of M, in memory that the next group overwrites."""
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


def _tree(terms: Floats) -> Floats:
    """Return the sum of ``terms``, which it overwrites: it adds the second half to the first until one is left.

    It uses NumPy, whose calls take a third of the time of PyTorch's.
    """
    with np.errstate(all="ignore"):  # a gradient scaler deals with overflow
        while (n := len(terms)) > 1:
            half = (n + 1) // 2
            first = terms[: n - half]
            np.add(first, terms[half:], out=first)
            terms = terms[:half]
    return terms[0]


def _symmetric(M: Floats) -> Floats:
    """Return M with its lower triangle mirrored to the upper: a BLAS may sum up the two in different orders."""
    return M.take(_places_below(len(M)))


@lru_cache(maxsize=64)
def _places_below(n: int) -> NDArray[np.intp]:
    """Return (n, n), for each entry of a matrix the flat index of its mirror image on or below the diagonal."""
    i = np.arange(n)
    return np.maximum(i[:, None], i) * n + np.minimum(i[:, None], i)


def _length(part: slice) -> int:
    return part.stop - part.start


def compute_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which products are computed.

    It is float64 if the user lets matrix products round to bfloat16 or TF32: that setting is global, so it could not be
    turned off here without a change to other threads' products.
    """
    if rows.dtype == torch.float64:
        return torch.float64
    setting = _matmul_precision("mkldnn" if rows.is_cpu else GPU, "matmul")
    return torch.float32 if setting in ("none", "ieee") else torch.float64


# The function that ``torch.backends.mkldnn.matmul.fp32_precision`` calls; its properties would cost 1 µs a call.
_matmul_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
