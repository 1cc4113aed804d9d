"""The operators in plain PyTorch: the CPU's back end, and any device's that has no kernels of its own.

A skinny product J Jᵀ leaves most of the memory bandwidth unused, because a matrix multiply is cut along its output,
which here is only T x T. So the columns are cut into chunks, a batched product multiplies each chunk with itself, and
the T x T partial products are summed in a fixed order. Gradients of several tensors are gathered a cache-sized block
at a time; the chunks of a segment run on across its tensors, so a list of tensors and the matrix of the same columns
give the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.ops import pages
from gradkern.ops.offsets import column_bounds
from gradkern.ops.registration import operator
from gradkern.ops.schema import arithmetic_dtype, sample

CHUNK = 2048
FEW_ROWS_CHUNK = 6144
"""Least columns of one product in the batch, up to three times as many; with up to four rows the latter. Measured at
T = 2 … 40: flat from 1024 to 8192; for few rows to 32768, where fewer chunks leave fewer partial products to sum."""
ALIGN = 8
"""A chunk is a multiple of this many columns, 32 bytes of float32: it divides most layers' sizes, to leave no rest."""
BLOCK = 1 << 20
"""Numbers gathered or converted at a time, all rows together: 4 MB of float32, which stays in cache."""
COLUMNS = 1 << 18
"""Columns combined at a time, so that the running sum stays in cache while the rows pass by."""

Erase = Callable[[int, int, Tensor], None]
"""Given a tensor's number, and from which entry on a matrix holds its rows: put 0 for those that do not count."""
Columns = Mapping[int, Sequence[Tensor | None]]
"""By its number, the T gradients of a tensor."""


@operator("gramian")
def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """M = J Jᵀ, per segment."""
    if offsets is None:
        return _matrix_gramian(J)
    bounds = column_bounds(offsets, J.shape[1])
    return torch.stack([_matrix_gramian(J[:, a:b]) for a, b in pairwise(bounds)])


@operator("gramian.tensors")
def gramian_tensors(grads: Sequence[Tensor | None], segments: Sequence[int], n_segments: int) -> Tensor:
    """M = J Jᵀ, per segment, of the rows that the tensors of a segment form one after another."""
    return segment_gramians(grads, segments, n_segments)


def segment_gramians(
    grads: Sequence[Tensor | None], segments: Sequence[int], n_segments: int, erase: Erase | None = None
) -> Tensor:
    """:func:`gramian_tensors`, of what ``erase`` leaves."""
    n = len(segments)
    like = sample(grads)
    T = len(grads) // n
    members: dict[int, dict[int, Sequence[Tensor | None]]] = defaultdict(dict)
    for k, s in enumerate(segments):
        column = grads[k::n]
        if any(g is not None for g in column):
            members[s][k] = [None if g is None else flat(g) for g in column]
    scratch = _Scratch(like)
    empty = like.new_zeros((T, T), dtype=arithmetic_dtype(like.dtype))
    return torch.stack(
        [_tensors_gramian(members[s], scratch, erase) if s in members else empty for s in range(n_segments)]
    )


def _matrix_gramian(J: Tensor) -> Tensor:
    if J.dtype == torch.float32 == _work_dtype(J) and J.stride(1) == 1:
        return _sum_of_products((J,), *J.shape)
    # float64 too: the BLAS's last bits then depend on the rows' alignment, which gathering makes equal.
    return _tensors_gramian({0: list(J)}, _Scratch(J))


class _Scratch:
    """Memory that each block of gathered columns overwrites, grown to the largest of them."""

    def __init__(self, like: Tensor) -> None:
        self._numbers = like.new_empty(0, dtype=_work_dtype(like))
        self.dtype = arithmetic_dtype(like.dtype)

    def first(self, count: int) -> Tensor:
        """Its first ``count`` numbers, whatever they are."""
        if len(self._numbers) < count:
            self._numbers = self._numbers.new_empty(count)
        return self._numbers[:count]


def _tensors_gramian(columns: Columns, scratch: _Scratch, erase: Erase | None = None) -> Tensor:
    """As :func:`_matrix_gramian`, of tensor k of task t at ``columns[k][t]``."""
    numels = [next(g.numel() for g in column if g is not None) for column in columns.values()]
    T = len(next(iter(columns.values())))
    blocks = _gathered(columns, numels, scratch, erase)
    return _sum_of_products(blocks, T, sum(numels)).to(scratch.dtype)


def _gathered(columns: Columns, numels: list[int], scratch: _Scratch, erase: Erase | None) -> Iterator[Tensor]:
    """The rows, a block of columns at a time, in scratch memory that every block overwrites."""
    T, P = len(next(iter(columns.values()))), sum(numels)
    step = min(_block_columns(T, P), P)
    if any(g is None for column in columns.values() for g in column):
        zeros = torch.zeros_like(scratch.first(min(step, max(numels))))

    def filled(pieces: list[_Piece]) -> Tensor:
        count = sum(piece.length for piece in pieces)
        rows = zip(*(piece.column for piece in pieces), strict=True)
        parts = [zeros[: p.length] if g is None else p.of(g) for row in rows for p, g in zip(pieces, row, strict=True)]
        block = torch.cat(parts, out=scratch.first(T * count)).view(T, count)
        if erase is not None:
            for piece, entries in zip(pieces, block.split([piece.length for piece in pieces], 1), strict=True):
                erase(piece.k, piece.start, entries)
        return block

    pieces: list[_Piece] = []
    room = step
    for (k, column), numel in zip(columns.items(), numels, strict=True):
        done = 0
        while done < numel:
            count = min(numel - done, room)
            pieces.append(_Piece(k, column, done, count, whole=count == numel))
            done += count
            room -= count
            if room == 0:
                yield filled(pieces)
                pieces, room = [], step
    if pieces or P == 0:
        yield filled(pieces) if pieces else scratch.first(0).view(T, 0)


class _Piece(NamedTuple):
    """Neighbouring entries of a tensor."""

    k: int
    column: Sequence[Tensor | None]
    start: int
    length: int
    whole: bool

    def of(self, g: Tensor) -> Tensor:
        """The piece of one gradient; a whole tensor is not sliced, which takes as long as copying a bias."""
        return g if self.whole else g[self.start : self.start + self.length]


def _sum_of_products(blocks: Iterable[Tensor], T: int, P: int) -> Tensor:
    """Σ X Xᵀ over blocks X of the P columns; every block but the last holds whole pairs of chunks."""
    width = _chunk_columns(T, P)
    if width == P:
        (X,) = blocks
        return torch.mm(X, X.t())
    lefts = _row_blocks(T)
    partials: list[list[Tensor]] = [[] for _ in lefts]
    for X in blocks:
        n = X.shape[1] // (2 * width) * 2
        chunks = X.as_strided((n, T, width), (width, X.stride(0), 1))
        for of_left, left in zip(partials, lefts, strict=True):
            of_left.append(torch.bmm(chunks[:, left.start :], chunks[:, left].mT))
        rest = X[:, n * width :]
    total = _symmetric(lefts, [(p[0] if len(p) == 1 else torch.cat(p)).sum(0) for p in partials])
    return total.add_(_sum_of_products((rest,), T, rest.shape[1])) if rest.shape[1] else total


def _row_blocks(T: int) -> list[slice]:
    """Rows that are multiplied with themselves and those after them: half of M is known from the other half.

    Of more rows at a time more is computed twice, while fewer leave a BLAS less to do for each number it packs. In
    blocks 20 rows of a million take 0.6 times as long as in one, 40 rows 0.75 times, 48 to 64 rows as long.
    """
    step = 16 if T <= 32 else 32
    return [slice(a, min(a + step, T)) for a in range(0, T, step)]


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


@lru_cache(maxsize=1024)
def _chunk_columns(T: int, P: int) -> int:
    """Columns of a chunk: those that divide P if any do, so that no rest costs a product of its own.

    All P where one product is the faster. A BLAS may sum one product of four rows or more in an order that depends on
    where in memory the rows lie; products in a batch, of two rows or three, or of few columns, it does not. So only
    those are used, and rows that lie apart and rows of a matrix give the same bits.
    """
    if P < 64 or (T <= 3 and P <= 1 << 15):
        return P
    least = FEW_ROWS_CHUNK if T <= 4 else CHUNK
    for width in range(least, min(3 * least, P // 2) + 1, ALIGN):
        if P % (2 * width) == 0:
            return width
    n = 2 * max(1, P // (2 * least))  # even, for cores come in twos
    return P // n // ALIGN * ALIGN if n <= 64 else least


@operator("cross")
def cross(A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    """A Bᵀ, per segment: a corner of the Gramian of both matrices' rows, on whatever back end that has."""
    bounds = column_bounds(offsets, A.shape[1])
    pieces = [row[a:b] for row in (*A, *B) for a, b in pairwise(bounds)]
    n_segments = len(bounds) - 1
    M = torch.ops.gradkern.gramian(pieces, list(range(n_segments)), n_segments)
    K = M[:, : len(A), len(A) :].contiguous()
    return K[0] if offsets is None else K


@operator("combine")
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """g = wᵀ J, per segment. A row whose weight is 0 is not read."""
    T, P = J.shape
    out = pages.empty(J, P)
    if offsets is None:
        _combine(J, w.reshape(T), out)
    else:
        bounds = column_bounds(offsets, P)
        for (a, b), of_segment in zip(pairwise(bounds), w.reshape(-1, T), strict=True):
            _combine(J[:, a:b], of_segment, out[a:b])
    return out


def _combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    weights = w.tolist()
    if J.dtype == w.dtype == _work_dtype(J) and J.stride(-1) == 1 and 0.0 not in weights:
        torch.mv(J.t(), w, out=out)
    else:
        combine_flat(list(J), weights, out)


@operator("combine.tensors")
def combine_tensors(grads: Sequence[Tensor | None], w: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[k] = Σ_t w[segments[k], t] grads[t, k]. A tensor whose weight is 0 is not read."""
    n = len(out)
    weights = w.tolist()
    for k in range(n):
        rows = [None if g is None else flat(g) for g in grads[k::n]]
        combine_flat(rows, weights[segments[k]], flat(out[k]))


def combine_flat(rows: Sequence[Tensor | None], weights: Sequence[float], out: Tensor) -> None:
    """out = Σ_t weights[t] rows[t], all of one dimension; a row of weight 0 is not read."""
    terms = [(row, w) for row, w in zip(rows, weights, strict=True) if row is not None and w != 0.0]
    if not terms:
        out.zero_()
        return
    # A row that ``out`` stands in is read before it is written if it is the first, and otherwise not.
    apart = arithmetic_dtype(out.dtype) != out.dtype or any(row.data_ptr() == out.data_ptr() for row, _ in terms[1:])
    if len(out) <= COLUMNS:
        _weighted_sum(terms, out, apart)
        return
    for a in range(0, len(out), COLUMNS):
        b = a + COLUMNS
        _weighted_sum([(row[a:b], w) for row, w in terms], out[a:b], apart)


def _weighted_sum(terms: list[tuple[Tensor, float]], out: Tensor, apart: bool) -> None:
    """``out`` of some terms that stay in cache; ``apart`` sums up in other memory, in arithmetic dtype."""
    work = arithmetic_dtype(out.dtype)
    total = torch.empty_like(out, dtype=work) if apart else out
    (first, weight), *others = terms
    torch.mul(first.to(work), weight, out=total)
    for row, weight in others:
        total.add_(row, alpha=weight)
    if apart:
        out.copy_(total)


@operator("project")
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """W J, per segment."""
    out = pages.empty(J, W.shape[-2], J.shape[1])
    bounds = column_bounds(offsets, J.shape[1])
    weights = W.reshape(-1, *W.shape[-2:])
    for (a, b), Ws in zip(pairwise(bounds), weights, strict=True):
        _project(J[:, a:b], Ws, out[:, a:b])
    return out


@operator("project.tensors")
def project_tensors(grads: Sequence[Tensor | None], W: Tensor, segments: Sequence[int], out: Sequence[Tensor]) -> None:
    """out[r, k] = Σ_t W[segments[k], r, t] grads[t, k]; ``out`` is row-major, R x n."""
    n = len(segments)
    for k in range(n):
        outs = [flat(o) for o in out[k::n]]
        rows = [torch.zeros_like(outs[0]) if g is None else flat(g) for g in grads[k::n]]
        product = outs[0].new_empty((len(outs), len(outs[0])))
        _project(torch.stack(rows), W[segments[k]], product)
        for o, row in zip(outs, product, strict=True):
            o.copy_(row)


def _project(J: Tensor, W: Tensor, out: Tensor) -> None:
    work = _work_dtype(J)
    W = W.to(work)
    if work == J.dtype:
        torch.mm(W, J, out=out)
        return
    step = max(1, BLOCK // J.shape[0])
    for a in range(0, J.shape[1], step):
        out[:, a : a + step] = W @ J[:, a : a + step].to(work)


def flat(g: Tensor) -> Tensor:
    """A dense tensor as the memory it is."""
    return g.flatten() if g.is_contiguous() else g.as_strided((g.numel(),), (1,))


def _block_columns(T: int, P: int) -> int:
    """Columns of a block of T rows: as many whole pairs of chunks as ``BLOCK`` holds."""
    pair = 2 * max(1, _chunk_columns(T, P))
    return max(1, BLOCK // T // pair) * pair


def _work_dtype(rows: Tensor) -> torch.dtype:
    """What the products are computed in. Where the user lets matrix products round to bfloat16 or TF32, float64:
    that setting is global, so it could not be turned off here without touching other threads' products.
    """
    if rows.dtype == torch.float64:
        return torch.float64
    setting = _matmul_precision("mkldnn" if rows.device.type == "cpu" else "cuda", "matmul")
    return torch.float32 if setting in ("none", "ieee") else torch.float64


# What ``torch.backends.mkldnn.matmul.fp32_precision`` reads; through all its properties that costs 1 µs a call.
_matmul_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
