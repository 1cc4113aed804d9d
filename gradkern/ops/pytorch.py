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
    rows = [[None if g is None else flat(g) for g in grads[t : t + n]] for t in range(0, len(grads), n)]
    like = sample(grads)
    M = like.new_zeros((n_segments, len(rows), len(rows)), dtype=arithmetic_dtype(like.dtype))
    members: dict[int, dict[int, Sequence[Tensor | None]]] = defaultdict(dict)
    for k, (s, column) in enumerate(zip(segments, zip(*rows, strict=True), strict=True)):
        if any(g is not None for g in column):
            members[s][k] = column
    for s, columns in members.items():
        M[s] = _tensors_gramian(columns, like, erase)
    return M


def _matrix_gramian(J: Tensor) -> Tensor:
    if J.dtype == torch.float32 == _work_dtype(J) and J.stride(1) == 1:
        return _sum_of_products((J,), *J.shape)
    # float64 too: the BLAS's last bits then depend on the rows' alignment, which gathering makes equal.
    return _tensors_gramian({0: list(J)}, J)


def _tensors_gramian(columns: Columns, like: Tensor, erase: Erase | None = None) -> Tensor:
    """As :func:`_matrix_gramian`, of tensor k of task t at ``columns[k][t]``."""
    numels = [next(g.numel() for g in column if g is not None) for column in columns.values()]
    T = len(next(iter(columns.values())))
    blocks = _gathered(columns, numels, like.new_empty((T, 0), dtype=_work_dtype(like)), erase)
    return _sum_of_products(blocks, T, sum(numels)).to(arithmetic_dtype(like.dtype))


def _gathered(columns: Columns, numels: list[int], like: Tensor, erase: Erase | None) -> Iterator[Tensor]:
    """The rows, a block of columns at a time, in one scratch matrix that every block overwrites."""
    T, P = len(like), sum(numels)
    step = min(_block_columns(T, P), P) or 1
    scratch = like.new_empty((T, step))
    filled = 0
    for (k, column), numel in zip(columns.items(), numels, strict=True):
        done = 0
        while done < numel:
            count = min(numel - done, step - filled)
            for t, g in enumerate(column):
                into = scratch[t, filled : filled + count]
                _ = into.zero_() if g is None else into.copy_(g[done : done + count])
            if erase is not None:
                erase(k, done, scratch[:, filled : filled + count])
            done += count
            filled += count
            if filled == step:
                yield scratch
                filled = 0
    if filled or P == 0:
        yield scratch[:, :filled]


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
    work = arithmetic_dtype(out.dtype)
    # A row that ``out`` stands in is read before it is written if it is the first, and otherwise not.
    in_place = work == out.dtype and all(row.data_ptr() != out.data_ptr() for row, _ in terms[1:])
    for a in range(0, out.shape[0], COLUMNS):
        into = out[a : a + COLUMNS]
        total = into if in_place else torch.empty_like(into, dtype=work)
        first, weight = terms[0]
        torch.mul(first[a : a + COLUMNS].to(work), weight, out=total)
        for row, weight in terms[1:]:
            total.add_(row[a : a + COLUMNS], alpha=weight)
        if total is not into:
            into.copy_(total)


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
    return g.as_strided((g.numel(),), (1,))


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
