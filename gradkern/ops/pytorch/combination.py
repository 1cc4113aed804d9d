"""Linear combinations wᵀ J in plain PyTorch, element by element and row by row.

Each element is summed up by itself, from the first row to the last, in arithmetic dtype. So it depends on nothing but
its own terms: not on addresses, not on the number of threads, not on how rows come or are cut. A row whose weight is 0
is not read.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from gradkern.ops.pytorch.observed import additions_agree, bags_agree
from gradkern.ops.schema import arithmetic_dtype

COLUMNS = 1 << 21
"""Columns combined at a time: 8 MB of a running sum that stays in the third cache while the rows pass by. An eighth of
that, which stays in the second, took a third longer: each operation, that much shorter, waits more for its threads."""
BAG = 1 << 11
"""Columns of a bag: a running sum that stays in the first cache. A bag is one thread's work. It has up to eight times
as many columns where P has no divisor that suits better, or no more columns."""


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
