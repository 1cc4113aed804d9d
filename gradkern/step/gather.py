"""The first half of a step: it takes the gradients from the source, and arranges them as rows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from gradkern.aggregators.history.averaged import Averaged
from gradkern.gradients import aliasing
from gradkern.gradients.embeddings import Compact
from gradkern.gradients.layouts import Row, real_numel
from gradkern.gradients.losses import Losses, Source, stacked, unscaled
from gradkern.gradients.memory import Memory, bools_on
from gradkern.gradients.param_grads import laid_out, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.step.flat_rows import Flat, FlatRows, fits, flattened
from gradkern.step.options import Options
from gradkern.step.rows import Rows
from gradkern.step.step_rows import StepRows


def gathered(
    source: Source, targets: Targets, options: Options, needs_tensors: bool
) -> tuple[Targets, list[Row], StepRows]:
    """Return the gradients of a step's tasks, and the rows that the step combines.

    Args:
        source: the source, which has been opened.
        targets: the parameters when the step began.
        options: the method and its modifiers.
        needs_tensors: whether the step needs each gradient as a tensor. If not, the rows of a small model are a matrix.

    Returns:
        The n parameters of the rows, which are ``targets`` unless a callable has changed them; T rows of n gradients,
        each laid out as its parameter, or no rows if they are a matrix; and the rows, which include remembered ones.
    """
    may_be_flat = not needs_tensors and _may_be_flat(options) and not tells_absent(source.present, options)
    flat = may_be_flat and fits(targets.layouts, len(source.present))
    compact = None
    if may_be_flat and not flat and not targets.layouts.lazy and isinstance(source, Losses):
        compact = Compact(targets.tensors)
        source.differentiate = compact.differentiate
    taken: list[Flat | Row] = _flat_gradients(source, targets) if flat else _gradients(source, targets)
    if compact is not None:
        compact.note()
    if source.frozen_grads or (isinstance(source, Losses) and source.has_callables):
        targets, taken = as_now(source, targets, taken)
    if flat and list(map(type, taken)).count(Flat) == source.present.count(True):
        return targets, [], _flat_rows(source, targets, taken, options)
    with torch.no_grad():
        new = [row_of(one, targets) for one in taken]
        losses = losses_of(source, targets, options)
        rows = rows_of(source.present, (losses, source.loss_scale), targets, new, options)
        if compact is not None and compact.params:
            rows = replace(rows, compact=frozenset(k for k, p in enumerate(targets.tensors) if p in compact.params))
        return targets, new, rows


def as_now(source: Source, before: Targets, taken: list[Flat | Row]) -> tuple[Targets, list[Flat | Row]]:
    """Return the parameters as the callables have left them, and their gradients; the arguments if nothing changed."""
    frozen_grads = source.frozen_grads
    others = {p for of_task in frozen_grads.values() for p in of_task}
    targets = before.as_now(others)
    if targets is before:
        return targets, taken
    rows: list[Flat | Row] = []
    for i, one in enumerate(taken):
        row = row_of(one, before)
        if others:
            found = dict(zip(before.tensors, row, strict=True)) | frozen_grads.get(i, {})
            row = [found.get(p) for p in targets.tensors]
        rows.append(readable(row, targets.tensors, targets.layouts))
    return targets, rows


def row_of(one: Flat | Row, targets: Targets) -> Row:
    """Return a task's gradients one by one, those of a vector as views."""
    return one.views(targets.tensors) if isinstance(one, Flat) else one


def _may_be_flat(options: Options) -> bool:
    method = options.aggregator
    needs_tensors = method.needs_entries or method.averages_rows or method.needs_second
    return options.memory is None and options.suppression is None and not needs_tensors


def tells_absent(present: Sequence[bool], options: Options) -> bool:
    """Return whether the method must be told which tasks are absent; without that their gradients are zeros."""
    method = options.aggregator
    told = options.memory is not None or method.needs_losses or method.needs_second or method.needs_present
    return told and not all(present)


def _absent(targets: Targets) -> Row:
    return [None] * len(targets.tensors)


def _flat_gradients(source: Source, targets: Targets) -> list[Flat | Row]:
    """Return each task's gradients as one vector, or where that is not possible, as :func:`_gradients` does."""
    taken: list[Flat | Row] = [_absent(targets)] * len(source.present)
    passes = partial(source.passes, keep=False) if isinstance(source, Losses) else source.passes
    for i, row in passes(targets.tensors):
        flat = flattened(row, targets.layouts)
        taken[i] = readable(aliasing.copies(row), targets.tensors, targets.layouts) if flat is None else flat
    return taken


def _gradients(source: Source, targets: Targets) -> list[Flat | Row]:
    """Return the gradients of this step's tasks, T rows of n, each laid out as its parameter; None where absent."""
    grads: list[Flat | Row] = [_absent(targets)] * len(source.present)
    for i, row in source.passes(targets.tensors):
        grads[i] = readable(row, targets.tensors, targets.layouts)
    return grads


def _flat_rows(source: Source, targets: Targets, taken: list[Flat | Row], options: Options) -> FlatRows:
    """Return the rows of the step as a matrix."""
    reach = tuple([one.reach if isinstance(one, Flat) else targets.layouts.none for one in taken])
    arrangement = targets.arranged(reach, None, None)
    return FlatRows(
        targets.tensors,
        [one.vector if isinstance(one, Flat) else None for one in taken],
        arrangement,
        losses=losses_of(source, targets, options),
        loss_scale=source.loss_scale,
    )


def rows_of(
    present: Sequence[bool],
    losses: tuple[Tensor | None, Tensor | None],
    targets: Targets,
    new: list[Row],
    options: Options,
) -> Rows:
    """Return the rows of the step, including remembered ones, and the mask of suppression.

    Args:
        present: for each task, whether its gradients are of this step.
        losses: ``losses`` and ``loss_scale`` of :class:`Rows`.
        targets: the n parameters.
        new: the gradients of this step, T rows of n.
        options: the method and its modifiers.
    """
    memory, suppression = options.memory, options.suppression
    taken, shared = (new, None) if memory is None else recalled(present, targets, new, memory)
    units = units_of(options, targets)
    reach = tuple(map(targets.layouts.reach_of, taken))
    if isinstance(options.aggregator, Averaged):
        shared = with_means(options.aggregator, targets, shared or targets.are_shared(reach))
    arrangement = targets.arranged(reach, shared, units)
    if not arrangement.columns:  # of sums of micro-batches, whose parameters have been frozen since
        raise ValueError("no task has a gradient for any parameter that requires grad")
    return Rows(
        targets.tensors,
        of_one_kind(taken, arrangement, targets),
        arrangement,
        mask=None if suppression is None else suppression.mask(targets.device),
        products_masked=suppression is not None and suppression.scope == "all",
        present=bools_on(present, targets.device) if tells_absent(present, options) else None,
        losses=losses[0],
        loss_scale=losses[1],
        overwrite=memory is None,
    )


def recalled(
    present: Sequence[bool], targets: Targets, new: list[Row], memory: Memory
) -> tuple[list[Row], tuple[bool, ...]]:
    """Return the rows with remembered gradients of absent tasks, and whether each parameter is shared.

    Unshared parameters use no remembered gradients: an absent task's head stays unchanged.
    """
    known = memory.recall(present, new, targets.tensors, targets.here, targets.layouts)
    shared = targets.are_shared(tuple(map(targets.layouts.reach_of, known)))
    taken: list[Row] = [
        [known[t][k] if is_shared else row[k] for k, is_shared in enumerate(shared)] for t, row in enumerate(new)
    ]
    return taken, shared


def with_means(method: Averaged, targets: Targets, shared: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return whether each parameter is shared: also if one task alone reaches it, but its means are kept."""
    if targets.named is not None:
        return shared
    return tuple([is_shared or method.knows(k) for k, is_shared in zip(targets.places, shared, strict=True)])


def units_of(options: Options, targets: Targets) -> tuple[int, ...] | None:
    """Return the first unit of suppression of each parameter; None without suppression."""
    given, suppression = targets.given, options.suppression
    if suppression is None:
        return None
    if UninitializedParameter in map(type, given.tensors):
        name = next(given.name(k) for k, p in enumerate(given.tensors) if is_lazy(p))
        raise ValueError(
            f"suppression needs the shapes of all params, because they decide where its masks lie; {name} has none "
            "yet: run its lazy module once before the first step"
        )
    first_units = suppression.first_units([real_numel(p) for p in given.tensors])
    return tuple([first_units[k] for k in targets.places])


def of_one_kind(rows: list[Row], arrangement: Arrangement, targets: Targets) -> list[Row]:
    """Return the rows with dense copies of sparse gradients of parameters that have dense gradients too."""
    if not arrangement.mixed:
        return rows
    return [
        [
            laid_out(g, p) if k in arrangement.mixed and g is not None and g.is_sparse else g
            for k, (g, p) in enumerate(zip(row, targets.tensors, strict=True))
        ]
        for row in rows
    ]


def losses_of(source: Source, targets: Targets, options: Options) -> Tensor | None:
    """Return the losses as the method sees them, (T,); None if it needs none."""
    return unscaled(stacked(source.values, targets.tensors[0]), source) if options.aggregator.needs_losses else None
