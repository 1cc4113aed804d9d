"""Linear combinations wᵀ J in PyTorch, element by element and row by row.

Each element is summed up separately, from the first row to the last, in arithmetic dtype. So it depends only on its own
terms: not on addresses, not on the number of threads, and not on how rows are stored or cut. A row whose weight is 0 is
not read.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.kernels.served import Tunable, served
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads, numels
from gradkern.ops.devices import CPU
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.offsets import column_bounds
from gradkern.ops.out import check_apart
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.chunks import SCRATCH
from gradkern.ops.pytorch.drops import WINDOW, Drops
from gradkern.ops.pytorch.observed import additions_agree, bags_agree

COLUMNS = 1 << 21
"""The number of columns combined at a time: a running sum of 8 MB, which stays in the third-level cache while all rows
are added. An eighth of that, which stays in the second-level cache, took a third longer, because each operation is
shorter and waits more for its threads."""
BAG = 1 << 11
"""The number of columns of a bag: a running sum that stays in the first-level cache. One thread works on a bag. A bag
has up to eight times as many columns if P has no better divisor, or if P is no more than that itself."""
BAGS = 1 << 20
"""The number of columns that are combined in bags at a time and then copied to given memory. Their 4 MB are then still
in the third-level cache, and lie in memory that was freed before; 40 MB would be new memory each time."""
TIDY = 1 << 15
"""The number of columns above which PyTorch's vectorized operations use several threads, as bags do from two on."""
FEW = 3
"""The number of rows up to which many columns are added up row by row in given memory. For two and three rows bags and
a copy take up to a third longer, for four as long, and for forty .8 of the time."""


class ColumnSetting(NamedTuple):
    """Setting of a combination row by row; see ``COLUMNS``. It changes no bit."""

    COLUMNS: int


served.tunable["columns"] = Tunable((3, 8, 40), lambda T, itemsize: ColumnSetting(COLUMNS))


@implements(operators.combine)
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute g = wᵀ J, per segment."""
    T, P = J.shape
    if offsets is None:
        return combine_matrix(widened(J), w.reshape(T)).to(J.dtype)
    out = J.new_empty(P)
    combine_out(J, w, offsets, out)
    return out


@implements(operators.combine_out)
def combine_out(J: Tensor, w: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """Compute g = wᵀ J, per segment, in ``out``."""
    check_apart(out, J, w)
    T, P = J.shape
    X = widened(J)
    if offsets is None:
        combine_matrix(X, w.reshape(T), out)
        return
    bounds = column_bounds(offsets, P)
    for (a, b), of_segment in zip(pairwise(bounds), w.reshape(len(bounds) - 1, T), strict=True):
        combine_matrix(X[:, a:b], of_segment, out[a:b])


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
    """Compute W J, per segment: each row of the result is a combination."""
    X = widened(J)
    bounds = column_bounds(offsets, J.shape[1])
    weights = W.reshape(-1, *W.shape[-2:])
    by_segment = [
        torch.stack([combine_matrix(X[:, a:b], w) for w in Ws])
        for (a, b), Ws in zip(pairwise(bounds), weights, strict=True)
    ]
    return torch.cat(by_segment, 1).to(J.dtype)


def widened(J: Tensor) -> Tensor:
    """Return J in arithmetic dtype if that fits into scratch memory, else J."""
    wanted = arithmetic_dtype(J.dtype)
    return J if J.dtype == wanted or J.numel() > SCRATCH else J.to(wanted)


def combine_matrix(J: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute wᵀ J, into ``out`` if that is given; ``w`` is (T,), in arithmetic dtype."""
    T, P = J.shape
    weights = w.tolist()
    width = _bag_width(P)
    fits_bags = width > 0 and J.is_contiguous() and J.is_cpu and J.dtype == w.dtype
    if fits_bags and any(weights) and bags_agree(J.dtype):
        if out is None:
            result = _in_bags(J, w, weights, width, 0, P)
            return _tidied(result) if P > TIDY else result
        if T > FEW or width == P:
            step = BAGS // width * width
            for a in range(0, P, step):
                block = out if step >= P else out[a : a + step]
                block.copy_(_in_bags(J, w, weights, width, a, min(a + step, P)))
            return out
    if out is None:
        out = J.new_empty(P)
    combine_flat(list(J), weights, out)
    return out


def _in_bags(J: Tensor, w: Tensor, weights: Sequence[float], width: int, start: int, end: int) -> Tensor:
    """Compute columns ``start:end`` of wᵀ J by torch's weighted sum of embeddings: one call, reading each row once."""
    T, P = J.shape
    n, first, stop = P // width, start // width, end // width
    nonzero = tuple([t for t, weight in enumerate(weights) if weight != 0.0])
    parts, starts = _bags(n, nonzero)
    if stop - first < n:
        parts, starts = parts[first * len(nonzero) : stop * len(nonzero)], starts[: stop - first]
    row_weights = w if len(nonzero) == T else w[list(nonzero)]
    part_weights = row_weights if stop - first == 1 else row_weights.repeat(stop - first)
    table = J.view(-1, width)
    return torch.embedding_bag(table, parts, starts, False, 0, False, part_weights)[0].view(-1)


def _tidied(result: Tensor) -> Tensor:
    """Return the bags' result after a multiplication by 1.

    After ``torch.embedding_bag``, MKL's matrix products take twice as long in the threads that shared the bags, until
    these have run a vectorized operation of PyTorch's. Next come Gramians of other rows, or the user's model. (Seen on
    AMD EPYC with torch 2.13. Upper halves of vector registers that stay in use would explain it.)
    """
    return result.mul_(1.0)


@lru_cache(maxsize=1024)
def _bag_width(P: int) -> int:
    """Return the width of the bags that P columns are divided into; 0 if no width fits."""
    if P <= 8 * BAG:
        return P
    return next((w for w in (*range(BAG, BAG // 8, -1), *range(BAG + 1, 8 * BAG + 1)) if P % w == 0), 0)


@lru_cache(maxsize=16)
def _bags(n: int, nonzero: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the parts of rows in n bags, and each bag's start; rows have n parts, and only rows ``nonzero`` count."""
    with torch.inference_mode(False):  # they are cached for calls outside of it
        parts = torch.arange(n, device="cpu").unsqueeze(1) + n * torch.tensor(nonzero, device="cpu")
        return parts.view(-1), torch.arange(0, parts.numel(), len(nonzero), device="cpu")


def combine_flat(rows: Sequence[Tensor | None], weights: Sequence[float], out: Tensor) -> None:
    """Compute out = Σ_t weights[t] rows[t], all of one dimension; None is a row of zeros."""
    terms = [(row, w) for row, w in zip(rows, weights, strict=True) if row is not None and w != 0.0]
    if not terms:
        out.zero_()
        return
    # A sum in ``out`` would overwrite a row in the same memory before reading it, unless that row is the first.
    apart = arithmetic_dtype(out.dtype) != out.dtype or any(row.data_ptr() == out.data_ptr() for row, _ in terms[1:])
    (columns,) = served["columns", len(rows), arithmetic_dtype(out.dtype).itemsize, CPU]
    if len(out) <= columns:
        _weighted_sum(terms, out, apart)
        return
    for a in range(0, len(out), columns):
        b = a + columns
        _weighted_sum([(row[a:b], w) for row, w in terms], out[a:b], apart)


def _weighted_sum(terms: list[tuple[Tensor, float]], out: Tensor, apart: bool) -> None:
    """Write the sum of ``terms``, which stay in cache, to ``out``; ``apart``: sum in other memory, then convert."""
    dtype = arithmetic_dtype(out.dtype)
    total = torch.empty_like(out, dtype=dtype) if apart else out
    fused = additions_agree(dtype)
    (first, weight), *others = terms
    # The sum starts with a zero, as in a bag: the sign of a sum of zeros depends on it.
    torch.add(_zero(dtype, out.device), first.to(dtype), alpha=weight, out=total)
    for row, weight in others:
        if fused:
            total.add_(row.to(dtype), alpha=weight)
        else:
            total.add_(row.to(dtype) * weight)
    if apart:
        out.copy_(total)


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is cached for calls outside of it
        return torch.zeros((), dtype=dtype, device=device)
