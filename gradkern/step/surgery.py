"""The surgery of a step: from the columns of task gradients to their weights, and how they are combined by these.

Writes to no ``.grad``: only what the method remembers, and once it combines, over gradients that are free. One launch
that does all combines at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.aggregators import Aggregator, GradAttention, Scalarization, Solution
from gradkern.modifiers.suppression import Mask
from gradkern.ops.backends import one_launch
from gradkern.ops.schema import arithmetic_dtype
from gradkern.step import rows
from gradkern.step.rows import Column
from gradkern.step.sampled_entries import Drawn


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        gramian: (S, T, T).
        outside: (T, T), the dot products outside surgery, where asked for.
        solution: the weights (S, T), and what else the method tells.
        plain: (T,), the weights outside surgery; None for ones.
        combine: gives each parameter with its gradient, which nobody else holds; and (), the share of entries that
            suppression kept, None without.
    """

    gramian: Tensor
    outside: Tensor | None
    solution: Solution
    plain: Tensor | None
    combine: Callable[[], tuple[list[tuple[Tensor, Tensor]], Tensor | None]]


def solve(
    columns: Sequence[Column],
    n_segments: int,
    aggregator: Aggregator,
    present: Tensor | None,
    mask_of_products: Mask | None,
    mask_of_results: Mask | None,
    outside: bool = False,
    weights_only: bool = False,
) -> Outcome:
    """Gramian and weights; and the combination too, where one launch does all.

    Args:
        columns: as :func:`rows.columns` gives them.
        n_segments: S.
        aggregator: the method.
        present: (T,) bool, the tasks whose gradients are of this step; None for all.
        mask_of_products: leave out of the dot products what it drops.
        mask_of_results: leave out of the results what it drops.
        outside: take dot products outside surgery too.
        weights_only: combine nothing yet.
    """
    if isinstance(aggregator, GradAttention):
        return _attend(columns, n_segments, aggregator, present, mask_of_products, mask_of_results, outside)
    if not weights_only and present is None:
        at_once = _at_once(columns, n_segments, aggregator, mask_of_results, mask_of_products is not None)
        if at_once is not None:
            return at_once
    products = rows.gramian(columns, n_segments, mask_of_products, outside)
    M = _usable(products[:n_segments], present)
    solution = aggregator.solution(M, present)
    w = solution.weights
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"aggregator {aggregator!r} must give weights as a floating tensor, gave {w!r}")
    if w.shape != M.shape[:-1]:
        raise ValueError(f"aggregator {aggregator!r} gave weights of shape {tuple(w.shape)} for M {tuple(M.shape)}")
    plain = None
    if isinstance(aggregator, Scalarization):
        plain = aggregator.weights_like(w.shape[-1], w.dtype, w.device)
    return Outcome(
        M,
        products[n_segments] if outside else None,
        solution,
        plain,
        lambda: rows.combine(columns, w, plain, mask_of_results),
    )


def _at_once(
    columns: Sequence[Column], n_segments: int, aggregator: Aggregator, mask: Mask | None, products_masked: bool
) -> Outcome | None:
    """All in one launch; None where the table of settings has none for it, or the method or the columns are not so."""
    first = next((c for c in columns if rows.only(c) is None), None)
    if first is None:
        return None
    T, device, dtype = len(first.grads), first.param.device, first.dtype
    sizes = one_launch(device.type, T, dtype)
    if not sizes:  # before all parameters are looked at
        return None
    summed = [c for c in columns if rows.only(c) is None]
    if any(c.sparse or c.dtype != dtype for c in summed) or sum(c.param.numel() for c in summed) not in sizes:
        return None
    program = aggregator.program(torch.empty((n_segments, T, T), dtype=arithmetic_dtype(dtype), device=device))
    if program is None:
        return None
    out = [c.result() for c in summed]
    given = (rows.row_major(summed), [-1 if c.segment is None else c.segment for c in summed], n_segments)
    kept: Tensor | None = None
    if mask is None:
        M, w = program.tensors(*given, *program.arguments, None, None, out)
    else:
        units = [c.unit for c in summed]
        masking = (units, mask.block, mask.words, products_masked)
        M, w, count = program.masked(*given, *program.arguments, None, None, *masking, out)
        kept = rows.share(count, summed)
    results = rows.own_gradients(columns) | dict(zip((c.param for c in summed), out, strict=True))
    told = [(c.param, results[c.param]) for c in columns]
    return Outcome(M, None, program.solution(M, w), None, lambda: (told, kept))


def _attend(
    columns: Sequence[Column],
    n_segments: int,
    aggregator: GradAttention,
    present: Tensor | None,
    mask_of_products: Mask | None,
    mask_of_results: Mask | None,
    outside: bool,
) -> Outcome:
    """As :func:`solve`, for the one method that sees entries of the gradients besides their Gramian."""
    drawn = Drawn(columns, n_segments, aggregator, mask_of_results)
    X = drawn.entries(masked=mask_of_products is not None)
    if present is not None:
        X = X.masked_fill(~present.unsqueeze(-1) & ~X.isfinite(), 0.0)  # as in _usable
    only_drawn = aggregator.update == "subset"
    products = drawn.gramian(X) if only_drawn else rows.gramian(columns, n_segments, mask_of_products, outside)
    M = _usable(products[:n_segments], present)
    # Where no two losses meet there is nothing to weigh, and nothing to learn from.
    attention = (
        aggregator.weights(M, drawn.stretches.tokens(X)) if drawn.shared else torch.full_like(M[:, 0], 1 / M.shape[-1])
    )
    w = attention if present is None else torch.where(present, attention, 0.0)
    return Outcome(
        M,
        products[n_segments] if outside and not only_drawn else None,
        Solution(w, attention=attention),
        None,
        lambda: drawn.combine(X, w) if only_drawn else rows.combine(columns, w, None, mask_of_results),
    )


def _usable(M: Tensor, present: Tensor | None) -> Tensor:
    """M without the absent tasks whose remembered gradient is not finite: one overflowed step must not spoil others."""
    if present is None:
        return M
    lost = ~present & ~M.diagonal(dim1=-2, dim2=-1).isfinite()
    return M.masked_fill(lost.unsqueeze(-1) | lost.unsqueeze(-2), 0.0)
