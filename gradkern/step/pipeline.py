"""The pipeline of a step: source → rows → Gramian → weights → sink.

The pipeline writes only after it has computed everything, so a step that raises leaves every ``.grad`` unchanged.
"""

import torch
from torch import Tensor

from gradkern.gradients.losses import Source, stacked
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import Placement, by_parameter, readable
from gradkern.gradients.parameters import Params, Targets
from gradkern.info import SurgeryInfo
from gradkern.step.options import Options
from gradkern.step.rows import Rows
from gradkern.step.sinks import Sink
from gradkern.step.surgery import Outcome, fixed_weights, surgery


def run(source: Source, sink: Sink, options: Options, params: Params) -> SurgeryInfo:
    """Take one step.

    Args:
        source: the source of the task gradients.
        sink: the sink of their combination.
        options: the method and its modifiers.
        params: as for :func:`gradkern.backward`.
    """
    refuse_distributed()
    options.check()
    targets = Targets.of(params, options.groups, options.shared)
    source.open(targets.device)
    if options.memory is not None:
        options.memory.check(len(source.present))
    if not sink.needs_rows:
        outcome = fixed_weights(options.aggregator, len(source.present), targets.device)
        sink.prepare(None, outcome, targets)
        sink.commit()
        sink.finish(None)
        return _info(source, outcome, options, kept=None, step_scale=None)
    new = _gradients(source, targets)
    with torch.no_grad():
        rows = _rows(source, targets, new, options)
        sink.check(rows)
        outcome = surgery(rows, options.aggregator, sink.needs_unshared, sink.takes_combination)
        step_scale = _step_scale(outcome, options)
        sink.prepare(rows, outcome, targets)
        sink.commit()
        if options.memory is not None:
            options.memory.remember(source.present, new, targets.tensors)
        try:
            kept = sink.finish(step_scale)
        finally:
            if rows.mask is not None:
                rows.mask.advance()
        return _info(source, outcome, options, kept, step_scale)


def _gradients(source: Source, targets: Targets) -> list[list[Tensor | None]]:
    """Return the gradients of this step's tasks, T rows of n, each laid out as its parameter; None where absent."""
    grads: list[list[Tensor | None]] = [[None] * len(targets.tensors) for _ in source.present]
    for i, row in source.passes(targets.tensors):
        grads[i] = readable(row, targets.tensors)
    return grads


def _rows(source: Source, targets: Targets, new: list[list[Tensor | None]], options: Options) -> Rows:
    """Return the rows of the step, including remembered ones, and the mask of suppression."""
    present, memory, suppression = source.present, options.memory, options.suppression
    recalled = new if memory is None else memory.recall(present, new, targets.tensors)
    shared = targets.are_shared(recalled)
    # Unshared parameters use no remembered gradients: an absent task's head stays unchanged.
    taken = [
        [recalled[t][k] if is_shared else row[k] for k, is_shared in enumerate(shared)] for t, row in enumerate(new)
    ]
    segments = [s if is_shared else None for s, is_shared in zip(targets.segments, shared, strict=True)]
    units = [-1] * len(segments)
    if suppression is not None:
        first_units = suppression.first_units([p.numel() for p in targets.given])
        units = [first_units[k] for k in targets.places]
    columns = by_parameter(targets.tensors, taken, Placement(segments, units), overwrite=memory is None)
    if not columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    return Rows(
        columns,
        targets.n_segments,
        mask=None if suppression is None else suppression.mask(targets.device),
        products_masked=suppression is not None and suppression.scope == "all",
        present=bools_on(present, targets.device) if memory is not None and not all(present) else None,
        losses=stacked(source.values, targets.tensors[0]) if options.aggregator.needs_losses else None,
    )


def _step_scale(outcome: Outcome, options: Options) -> Tensor | None:
    """Return κ of the whole model's Gramian; None without ConflictLR."""
    if options.conflict_lr is None:
        return None
    assert outcome.gramian is not None, "rows have a Gramian"
    return options.conflict_lr.scale(outcome.gramian.sum(0))


def _info(
    source: Source, outcome: Outcome, options: Options, kept: Tensor | None, step_scale: Tensor | None
) -> SurgeryInfo:
    solution = outcome.solution
    is_single = options.groups == "model" and outcome.gramian is not None

    def of_group(value: Tensor) -> Tensor:
        return value[0] if is_single else value  # a single group has no dimension

    def of_group_if_any(value: Tensor | None) -> Tensor | None:
        return None if value is None else of_group(value)

    return SurgeryInfo(
        losses=stacked(source.values, solution.weights),
        gramian=of_group_if_any(outcome.gramian),
        weights=of_group(solution.weights),
        targets=of_group_if_any(solution.targets),
        attention=of_group_if_any(solution.attention),
        kept=kept,
        step_scale=step_scale,
    )


def refuse_distributed() -> None:
    """Raise ValueError if torch.distributed runs on more than one rank."""
    d = torch.distributed
    if d.is_available() and d.is_initialized() and d.get_world_size() > 1:
        raise ValueError(
            f"torch.distributed runs on {d.get_world_size()} ranks: the gradient of one task goes past the all-reduce "
            "of DistributedDataParallel, so the ranks would drift apart. Gradient surgery works on one rank for now"
        )
