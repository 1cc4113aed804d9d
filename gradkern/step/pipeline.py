"""The pipeline of a step: source → rows → Gramian → weights → sink.

The pipeline writes only after it has computed everything, so a step that raises leaves every ``.grad`` unchanged.
"""

import torch
from torch import Tensor

from gradkern.gradients.losses import Source, stacked
from gradkern.gradients.memory import Memory, bools_on
from gradkern.gradients.param_grads import laid_out, reach_of, readable
from gradkern.gradients.parameters import Params, Targets
from gradkern.gradients.plan import Arrangement, Row
from gradkern.info import SurgeryInfo
from gradkern.modifiers.suppression import Suppression
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


def _gradients(source: Source, targets: Targets) -> list[Row]:
    """Return the gradients of this step's tasks, T rows of n, each laid out as its parameter; None where absent."""
    grads: list[Row] = [[None] * len(targets.tensors)] * len(source.present)
    for i, row in source.passes(targets.tensors, keep=True):
        grads[i] = readable(row, targets.tensors, targets.layouts)
    return grads


def _rows(source: Source, targets: Targets, new: list[Row], options: Options) -> Rows:
    """Return the rows of the step, including remembered ones, and the mask of suppression."""
    memory, suppression = options.memory, options.suppression
    taken, shared = (new, None) if memory is None else _recalled(source, targets, new, memory)
    units = None if suppression is None else _units(suppression, targets)
    arrangement = targets.arranged(tuple(map(reach_of, taken)), shared, units)
    _check_graphs(source, arrangement)
    if not arrangement.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    return Rows(
        targets.tensors,
        _of_one_kind(taken, arrangement, targets),
        arrangement,
        mask=None if suppression is None else suppression.mask(targets.device),
        products_masked=suppression is not None and suppression.scope == "all",
        present=bools_on(source.present, targets.device) if memory is not None and not all(source.present) else None,
        losses=stacked(source.values, targets.tensors[0]) if options.aggregator.needs_losses else None,
        overwrite=memory is None,
    )


def _check_graphs(source: Source, arrangement: Arrangement) -> None:
    """Have the source check its graphs, which takes as long as the dot products of a small model.

    Parameters that a graph hides have no gradient. So a step is checked if its reach is new, or if it has parameters
    that no task reaches.
    """
    if not arrangement.graphs_checked or len(arrangement.columns) < arrangement.n:
        source.check_graphs()
        arrangement.graphs_checked = True


def _recalled(source: Source, targets: Targets, new: list[Row], memory: Memory) -> tuple[list[Row], tuple[bool, ...]]:
    """Return the rows with remembered gradients of absent tasks, and whether each parameter is shared.

    Unshared parameters use no remembered gradients: an absent task's head stays unchanged.
    """
    recalled = memory.recall(source.present, new, targets.tensors, targets.layouts)
    shared = targets.are_shared(tuple(map(reach_of, recalled)))
    taken: list[Row] = [
        [recalled[t][k] if is_shared else row[k] for k, is_shared in enumerate(shared)] for t, row in enumerate(new)
    ]
    return taken, shared


def _units(suppression: Suppression, targets: Targets) -> tuple[int, ...]:
    first_units = suppression.first_units([p.numel() for p in targets.given])
    return tuple([first_units[k] for k in targets.places])


def _of_one_kind(rows: list[Row], arrangement: Arrangement, targets: Targets) -> list[Row]:
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
