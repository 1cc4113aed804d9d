"""Linear combinations wᵀ J in PyTorch, element by element and row by row.

Each element is summed up by itself, from the first row to the last, in arithmetic dtype. So it depends on nothing but
its own terms: not on addresses, not on the number of threads, not on how rows come or are cut. A row whose weight is 0
is not read.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads, numels
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.offsets import column_bounds
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.chunks import SCRATCH
from gradkern.ops.pytorch.drops import WINDOW, Drops
from gradkern.ops.pytorch.observed import additions_agree, bags_agree

COLUMNS = 1 << 21
"""Columns combined at a time: 8 MB of a running sum that stays in the third cache while the rows pass by. An eighth of
that, which stays in the second, took a third longer: each operation, that much shorter, waits more for its threads."""
BAG = 1 << 11
"""Columns of a bag: a running sum that stays in the first cache. A bag is one thread's work. It has up to eight times
as many columns where P has no divisor that suits better, or no more columns."""


@implements(operators.combine)
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute g = wᵀ J, per segment."""
    T, P = J.shape
    if offsets is None:
        return combine_matrix(widened(J), w.reshape(T)).to(J.dtype)
    out = J.new_empty(P)
    bounds = column_bounds(offsets, P)
    for (a, b), of_segment in zip(pairwise(bounds), w.reshape(-1, T), strict=True):
        combine_matrix(J[:, a:b], of_segment, out[a:b])
    return out


@implements(operators.combine_tensors)
def combine_tensors(
    rows: TaskGrads, w: Tensor, out: Sequence[Tensor], mask: Mask | None = None, kept: Tensor | None = None
) -> None:
    """Compute out[k] = Σ_t w[s, t] grads[t, k] where kept, 0 elsewhere."""
    weights = w.tolist()
    drops = None if mask is None else Drops(mask, numels(out, len(out)))
    for k, s in enumerate(rows.segments):
        column = [None if g is None else flat(g) for g in rows.column(k)]
        result = flat(out[k])
        if drops is None:
            combine_flat(column, weights[s], result)
            continue
        for a in range(0, len(result), WINDOW):
            piece = result[a : a + WINDOW]
            combine_flat([None if g is None else g[a : a + WINDOW] for g in column], weights[s], piece)
            drops.erase(k, a, piece, kept)


@implements(operators.project)
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute W J, per segment: each row of it is a combination."""
    X = widened(J)
    bounds = column_bounds(offsets, J.shape[1])
    weights = W.reshape(-1, *W.shape[-2:])
    of_segments = [
        torch.stack([combine_matrix(X[:, a:b], w) for w in Ws])
        for (a, b), Ws in zip(pairwise(bounds), weights, strict=True)
    ]
    return torch.cat(of_segments, 1).to(J.dtype)


def widened(J: Tensor) -> Tensor:
    """Return J in arithmetic dtype where all of it then fits into scratch memory, else J."""
    wanted = arithmetic_dtype(J.dtype)
    return J if J.dtype == wanted or J.numel() > SCRATCH else J.to(wanted)


def combine_matrix(J: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """wᵀ J, in ``out`` if that is given; ``w`` is (T,), in arithmetic dtype."""
    P = J.shape[1]
    weights = w.tolist()
    width = _bag_width(P)
    as_table = width > 0 and J.is_contiguous() and J.is_cpu and J.dtype == w.dtype
    if out is None and as_table and any(weights) and bags_agree(J.dtype):
        return _in_bags(J, w, weights, width)
    if out is None:
        out = J.new_empty(P)
    combine_flat(list(J), weights, out)
    return out


def _in_bags(J: Tensor, w: Tensor, weights: Sequence[float], width: int) -> Tensor:
    """By the weighted sums of rows of a table that torch has for embeddings: one call, which reads each row once."""
    T, P = J.shape
    n = P // width
    counting = tuple(t for t, weight in enumerate(weights) if weight != 0.0)
    parts, starts = _bags(T, n, counting)
    of_rows = w if len(counting) == T else w[list(counting)]
    of_parts = of_rows if n == 1 else of_rows.repeat(n)
    table = J.view(-1, width)
    return torch.embedding_bag(table, parts, starts, False, 0, False, of_parts)[0].view(-1)


@lru_cache(maxsize=1024)
def _bag_width(P: int) -> int:
    """Columns of the bags that P is divided into; 0 if there is no such number."""
    if P <= 8 * BAG:
        return P
    return next((w for w in (*range(BAG, BAG // 8, -1), *range(BAG + 1, 8 * BAG + 1)) if P % w == 0), 0)


@lru_cache(maxsize=16)
def _bags(T: int, n: int, counting: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The parts of rows that n bags hold, where T rows have n parts each and ``counting`` count; where a bag begins."""
    with torch.inference_mode(False):  # they are kept for calls outside of it
        parts = torch.arange(n, device="cpu").unsqueeze(1) + n * torch.tensor(counting, device="cpu")
        return parts.view(-1), torch.arange(0, parts.numel(), len(counting), device="cpu")


def combine_flat(rows: Sequence[Tensor | None], weights: Sequence[float], out: Tensor) -> None:
    """out = Σ_t weights[t] rows[t], all of one dimension; None is a row of zeros."""
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
    at_once = additions_agree(work)
    (first, weight), *others = terms
    # Sums begin with a zero, and so have its sign where all terms are zeros: as they do in a bag.
    torch.add(_zero(work, out.device), first.to(work), alpha=weight, out=total)
    for row, weight in others:
        if at_once:
            total.add_(row.to(work), alpha=weight)
        else:
            total.add_(row.to(work) * weight)
    if apart:
        out.copy_(total)


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept for calls outside of it
        return torch.zeros((), dtype=dtype, device=device)
