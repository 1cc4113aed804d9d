"""The surgery of a step: it computes the Gramian of the rows, the weights, and the weighted combination.

It does not write to ``.grad``. It writes to the method's state, and the combination may overwrite free gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators import Aggregator, Entrywise, GradAttention, Solution
from gradkern.aggregators.base import OwnGrads
from gradkern.ops import one_launch, operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.entrywise import EntrywiseRows
from gradkern.step.flat_rows import FlatRows
from gradkern.step.masked import kept_share, mask_over
from gradkern.step.notices import warn_once
from gradkern.step.rows import AnyRows, Combined, Results, Rows
from gradkern.step.sampled_entries import SampledRows
from gradkern.step.step_rows import StepRows


@dataclass(frozen=True)
class Outcome:
    """Result of a step's surgery.

    Attributes:
        gramian: (S, T, T); None for a method that weighs losses without it, or if nothing needs it of a method without
            weights.
        unshared_gramian: (T, T), the dot products over unshared parameters; None unless requested.
        solution: the weights (S, T), and the method's other results; None for a method without weights.
        unshared_weights: (T,), the weights of unshared parameters; None for ones.
        combine: returns each parameter with its gradient, and the share of entries that suppression kept.
    """

    gramian: Tensor | None
    unshared_gramian: Tensor | None
    solution: Solution | None
    unshared_weights: Tensor | None
    combine: Callable[[], Combined]


def surgery(
    rows: StepRows, aggregator: Aggregator, unshared: bool, takes_combination: bool, measured: bool = True
) -> Outcome:
    """Compute Gramian and weights, and also the combination if one launch can do all of it.

    Args:
        rows: the task gradients.
        aggregator: the method.
        unshared: whether to compute dot products over unshared parameters too.
        takes_combination: whether the combination will be needed.
        measured: whether the Gramian is needed for something else than the weights.

    Raises:
        TypeError, ValueError: the method does not return weights (S, T).
    """
    if isinstance(aggregator, Entrywise):
        return _entry_by_entry(rows, aggregator, measured)
    fused = None
    if isinstance(rows, FlatRows):
        fused = None if unshared else _in_one_call(rows, aggregator)
    elif takes_combination and rows.present is None and type(rows) is Rows:  # and no other kind of them
        fused = _in_one_launch(rows, aggregator)
    if fused is not None:
        return fused
    sampled = None
    if isinstance(aggregator, GradAttention):
        assert isinstance(rows, Rows), "its entries are sampled from tensors"
        sampled = SampledRows(rows, aggregator)
    used_rows: AnyRows = rows if sampled is None or not sampled.only else sampled
    products = used_rows.gramian(unshared)
    M = _usable(products[: rows.n_segments], rows.present)
    solution = _solution(aggregator, M, rows) if sampled is None else sampled.solution(M)
    w = _checked_weights(aggregator, solution.weights, M)
    own = of_optimizer(aggregator, solution.own, rows.of_step, rows.loss_scale)

    def combine() -> Combined:
        results, kept = used_rows.combine(w, solution.unshared)
        return [*results, *own], kept

    unshared_products = products[rows.n_segments] if len(products) > rows.n_segments else None
    return Outcome(M, unshared_products, solution, solution.unshared, combine)


def of_optimizer(
    aggregator: Aggregator, own: OwnGrads, params: Sequence[Tensor], loss_scale: Tensor | None
) -> OwnGrads:
    """Return the gradients of the method's own parameters that are among ``params``; warn of others once.

    They are multiplied by ``loss_scale``, as all other gradients have been.
    """
    if not own:
        return own
    known = set(params)
    trained = [(p, g if loss_scale is None else g * loss_scale.to(g.dtype)) for p, g in own if p in known]
    if any(p.requires_grad and p not in known for p, _ in own):
        warn_once(
            aggregator,
            "untrained",
            f"nothing trains the parameters of {aggregator!r}, since they are not among params: give the optimizer "
            "[*model.parameters(), *method.parameters()], or a group of their own by add_param_group",
        )
    return trained


def _entry_by_entry(rows: StepRows, aggregator: Entrywise, measured: bool) -> Outcome:
    """Return the outcome of a method without weights, and the Gramian if that is needed."""
    assert isinstance(rows, Rows), "its entries are read from tensors"
    entrywise = EntrywiseRows(rows, aggregator)
    M = _usable(rows.gramian(False), rows.present) if measured else None
    return Outcome(M, None, None, None, entrywise.combine)


def _in_one_launch(rows: Rows, aggregator: Aggregator) -> Outcome | None:
    """Do all in one launch; return None if the sizes, the method or the gradients do not allow it."""
    batches = rows.arrangement.sums
    if len(batches) != 1 or any(c.own is None for c in rows.arrangement.sparse):
        return None
    (batch,) = batches
    sizes = one_launch.sizes(rows.device, rows.n_tasks, batch.dtype)
    if not sizes or sum(c.numel for c in batch.columns) not in sizes:
        return None
    shape = (rows.n_segments, rows.n_tasks, rows.n_tasks)
    program = aggregator.program(torch.empty(shape, dtype=arithmetic_dtype(batch.dtype), device=rows.device))
    if program is None:
        return None
    results = Results(rows)
    out = results.memory(batch.columns)
    segments = [-1 if c.segment is None else c.segment for c in batch.columns]
    grads = TaskGrads(batch.of(rows.grads), segments, rows.n_segments)
    kept = None if rows.mask is None else rows.mask.state.new_zeros(())
    mask = mask_over(batch.columns, rows.mask)
    M, w = operators.surgery(grads, program.projection, out, mask, rows.products_masked, kept)
    results.take_own()
    share = None if kept is None else kept_share(kept, batch.columns)
    return Outcome(M, None, program.solution(M, w), None, lambda: (results.pairs(), share))


def _in_one_call(rows: FlatRows, aggregator: Aggregator) -> Outcome | None:
    """Do all on the matrix in one call; return None if the method does not allow it."""
    first, S, T = rows.blocks[0], rows.n_segments, rows.n_tasks
    program = aggregator.program(first.new_empty((S, T, T)))
    if program is None:
        return None
    # The blocks are new plain tensors of a step that no mode watches, so the call needs no check and no dispatcher.
    compute = operators.surgery_blocks.implementation(first.device.type)
    M, w, combined = compute(rows.blocks, program.projection)
    return Outcome(M, None, program.solution(M, w), None, lambda: (rows.results(combined, None), None))


def _solution(aggregator: Aggregator, M: Tensor, rows: StepRows) -> Solution:
    """Return the method's solution. It sees gradients and losses without the scale of a gradient scaler."""
    given: dict[str, Any] = {}
    if aggregator.needs_losses:
        given["losses"] = rows.losses
    if aggregator.needs_eps:
        given["eps"] = rows.eps
    if aggregator.needs_second:
        assert isinstance(rows, Rows), "dot products are of tensors"
        given["cross"] = _unscaled(rows.cross(), rows)
    return aggregator.solution(_unscaled(M, rows), rows.present, **given)


def _unscaled(products: Tensor, rows: StepRows) -> Tensor:
    """Return dot products of gradients that a gradient scaler's scale has not multiplied."""
    scale = rows.loss_scale
    return products if scale is None else products / (scale * scale).to(products.dtype)


def _usable(M: Tensor, present: Tensor | None) -> Tensor:
    """Return M with zeros for absent tasks whose remembered gradients overflowed, so that no other task is spoilt."""
    if present is None:
        return M
    lost = ~present & ~M.diagonal(dim1=-2, dim2=-1).isfinite()
    return M.masked_fill(lost.unsqueeze(-1) | lost.unsqueeze(-2), 0.0)


def _checked_weights(aggregator: Aggregator, w: object, M: Tensor) -> Tensor:
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise TypeError(f"aggregator {aggregator!r} must give weights as a floating tensor, gave {w!r}")
    if w.shape != M.shape[:-1]:
        raise ValueError(f"aggregator {aggregator!r} gave weights of shape {tuple(w.shape)} for M {tuple(M.shape)}")
    return w
