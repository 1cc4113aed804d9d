"""GradDrop and the trimmed mean in PyTorch: the gradients of an entry are combined by themselves, row by row.

Entries are computed in windows whose sums stay in cache while all rows are read, each once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import Coins, Mask, TaskGrads, numels
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.philox import coins as draw_coins
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import flat
from gradkern.ops.pytorch.drops import Drawn, Drops

WINDOW = 1 << 15
"""The number of entries computed at a time: a running sum of 128 KB in float32, of which some stay in the second-level
cache together."""

Row = tuple[int, Tensor]
"""The number of a task, and some of its gradients in arithmetic dtype."""
Combine = Callable[[Iterator[Row], int, int, Tensor], Tensor]
"""Returns the result of some entries, given their rows, without missing ones; the number of their parameter, the first
of them there, and zeros, one for each."""


@implements(operators.graddrop)
def graddrop(
    rows: TaskGrads,
    coins: Coins,
    coefficients: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write the gradients of one sign at each entry."""
    dtype, positions = arithmetic_dtype(out[0].dtype), coins.positions
    end = max(first + n for first, n in zip(positions, numels(out, len(out)), strict=True))
    drawn = Drawn(lambda first, n: draw_coins(first, n, coins.stream, dtype), end)
    scales = None if coefficients is None else coefficients.mT.tolist()

    def combine(of_tasks: Iterator[Row], k: int, start: int, zeros: Tensor) -> Tensor:
        first = positions[k] + start
        return _of_one_sign(of_tasks, drawn.units(first, first + len(zeros)), scales, zeros)

    _entry_by_entry(rows, out, combine, mask, kept)


@implements(operators.trimmed_mean)
def trimmed_mean(
    rows: TaskGrads,
    k: int,
    weights: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write the mean of the entries between the k largest and the k smallest."""
    combine: Combine = partial(_trimmed, cut=k, T=rows.n_tasks)
    if weights is not None:
        combine = partial(_trimmed_and_weighted, cut=k, weights=weights)
    _entry_by_entry(rows, out, combine, mask, kept)


def _entry_by_entry(
    rows: TaskGrads, out: Sequence[Tensor], combine: Combine, mask: Mask | None, kept: Tensor | None
) -> None:
    drops = None if mask is None else Drops(mask, numels(out, len(out)))
    for k, result in enumerate(map(flat, out)):
        column = [None if g is None else flat(g) for g in rows.column(k)]
        for a in range(0, len(result), WINDOW):
            piece = result[a : a + WINDOW]
            zeros = torch.zeros_like(piece, dtype=arithmetic_dtype(piece.dtype))
            piece.copy_(combine(_rows(column, a, zeros), k, a, zeros))
            if drops is not None:
                drops.erase(k, a, piece, kept)


def _rows(column: Sequence[Tensor | None], start: int, zeros: Tensor) -> Iterator[Row]:
    for t, g in enumerate(column):
        yield t, zeros if g is None else g[start : start + len(zeros)].to(zeros.dtype)


def _of_one_sign(rows: Iterator[Row], coin: Tensor, scales: list[list[float]] | None, zeros: Tensor) -> Tensor:
    """Return the sum of the positive entries where ``coin`` chooses them, else that of the negative ones."""
    part = torch.empty_like(zeros)
    above, below = zeros.clone(), zeros.clone()
    # The result where positive entries are chosen, and where negative ones are.
    of_above, of_below = (above, below) if scales is None else (zeros.clone(), zeros.clone())
    for t, x in rows:
        chosen, other = (1.0, 0.0) if scales is None else scales[t]
        if chosen == 0:
            x = _finite(x)
        for clamp, total, ours, theirs in (
            (torch.clamp_min, above, of_above, of_below),
            (torch.clamp_max, below, of_below, of_above),
        ):
            clamp(x, 0, out=part)
            total += part
            if scales is not None:
                ours.add_(part, alpha=chosen)
                theirs.add_(part, alpha=other)
    size = torch.sub(above, below, out=part)
    result = torch.where(coin.mul(size) < above, of_above, of_below)
    return result.add_(size.sub_(size.clone()))  # NaN where it is not finite


def _trimmed(rows: Iterator[Row], k: int, start: int, zeros: Tensor, *, cut: int, T: int) -> Tensor:
    """Return the mean without the ``cut`` largest and smallest.

    Each row goes through the largest so far, what it displaces goes through the smallest so far, and what that
    displaces is between them for good.
    """
    largest: list[Tensor] = []
    smallest: list[Tensor] = []
    total, broken = zeros.clone(), zeros.clone()
    for _, x in rows:
        broken += x - x
        rest: Tensor | None = _sifted(x, largest, cut, torch.maximum, torch.minimum)
        if rest is not None:
            rest = _sifted(rest, smallest, cut, torch.minimum, torch.maximum)
        if rest is not None:
            total += rest
    return total.div_(T - 2 * cut).add_(broken)  # NaN where an entry is not finite


def _sifted(
    new: Tensor, kept: list[Tensor], most: int, first: Callable[..., Tensor], last: Callable[..., Tensor]
) -> Tensor | None:
    """Put entries in their place among those ``kept``, ``most`` of them, and return what they displace, if any.

    ``first`` and ``last`` return which of two entries comes first and last in ``kept``.
    """
    for j, old in enumerate(kept):
        kept[j], new = first(new, old), last(new, old)
    if len(kept) < most:
        kept.append(new)
        return None
    return new


def _trimmed_and_weighted(
    rows: Iterator[Row], k: int, start: int, zeros: Tensor, *, cut: int, weights: Tensor
) -> Tensor:
    """Return the same of entries that are multiplied by weights once it is known which are left."""
    w = weights.to(zeros.dtype)
    X = torch.stack([x if weight else _finite(x) for (_, x), weight in zip(rows, w.tolist(), strict=True)])
    left = X.argsort(dim=0, descending=True, stable=True)[cut : len(X) - cut]
    total = (X * w.unsqueeze(1)).gather(0, left).sum(0)
    return total.div_(len(left)).add_((X - X).sum(0))


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)
