"""The pipeline of a step: source → rows → Gramian → weights → sink.

The pipeline writes only after it has computed everything, so a step that raises leaves every ``.grad`` unchanged. It
puts the state of the method, the masks, the memory and the sketch back as they were.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.history.averaged import Averaged
from gradkern.distributed.comm import comm_of
from gradkern.distributed.draws import same_draws
from gradkern.gradients.features import LossesOnFeatures
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Losses, Source, stacked
from gradkern.gradients.parameters import Params, Targets
from gradkern.gradients.sharded import differentiated_by_hooks, is_dtensor
from gradkern.info import SurgeryInfo
from gradkern.ops.undo import Undo
from gradkern.step.activation_rows import ActivationRows
from gradkern.step.activations_on_ranks import activations_on_ranks
from gradkern.step.averages import averaged
from gradkern.step.begin import Start, start
from gradkern.step.gather import gathered
from gradkern.step.notices import look
from gradkern.step.on_parts import gathered_in_parts
from gradkern.step.on_ranks import gathered_on_ranks
from gradkern.step.options import Options
from gradkern.step.refused_ways import refuse_way
from gradkern.step.rows import Rows
from gradkern.step.second import Second, check_wanted, opened, with_second
from gradkern.step.sinks import Sink, WeightedBackwardSink
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome, surgery
from gradkern.step.through_activations import through_activations
from gradkern.step.through_features import through_features

Step = TypeVar("Step", bound=Callable[..., Any])


def outside_inference_mode(step: Step) -> Step:
    """Make a step run outside of inference mode, which would record no graph and make state that nothing may change."""

    @wraps(step)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return step(*args, **kwargs)
        with torch.inference_mode(False):
            return step(*args, **kwargs)

    return outside  # type: ignore[return-value]


@outside_inference_mode
def run(source: Source, sink: Sink, options: Options, params: Params, second: Second = None) -> SurgeryInfo:
    """Take one step.

    Args:
        source: the source of the task gradients.
        sink: the sink of their combination.
        options: the method and its modifiers.
        params: as for :func:`gradkern.backward`.
        second: as for :func:`gradkern.backward`.
    """
    comm, begun = comm_of(options.process_group), None
    if comm is None:
        targets, second_losses = _opened(source, options, params, second)
        present = source.present
        _refuse_dtensors(targets)
    else:
        begun = start(comm, source, options, sink, lambda: _opened(source, options, params, second))
        targets, second_losses, present = begun.targets, None, begun.present
    _check_present(present, options.aggregator)
    if isinstance(sink, WeightedBackwardSink) and not sink.needs_rows:
        with Undo(options.aggregator.snapshot()):
            outcome = sink.weigh(targets, present)
            sink.commit(None)
        sink.finish()
        return _info(sink.mean_losses(), targets, outcome, kept=None, step_scale=None)
    new: list[Row] = []
    rows: StepRows
    if options.way.through == "activations":
        assert isinstance(source, Losses), "others are refused"
        rows = (
            through_activations(source, targets, options)
            if begun is None
            else activations_on_ranks(source, options, begun)
        )
    elif options.way.through == "features":
        assert isinstance(source, LossesOnFeatures), "others are refused"
        targets, rows = through_features(source, targets, options, begun)
    elif begun is None:
        targets, new, rows = gathered(source, targets, options, sink.needs_tensors)
    elif targets.has_dtensors:
        new, rows = gathered_in_parts(source, options, begun)
    else:
        targets, new, rows = gathered_on_ranks(source, options, begun, sink.takes_rows)
    if second_losses is not None:
        rows = with_second(rows, second_losses, targets)
    with torch.set_grad_enabled(False):  # three calls; no_grad makes seven
        with Undo(*options.snapshot()):
            sink.check(rows)
            look(source, present, targets, options, rows)
            if isinstance(options.aggregator, Averaged):
                assert isinstance(rows, Rows), "means are kept of tensors"
                rows = averaged(rows, options.aggregator, present, targets.places)
            with same_draws(comm, options.aggregator, targets.device):
                outcome = surgery(
                    rows,
                    options.aggregator,
                    sink.needs_unshared,
                    sink.takes_combination,
                    options.conflict_lr is not None,
                )
            step_scale = _step_scale(outcome, options)
            sink.prepare(rows, outcome, targets)
            kept = sink.commit(step_scale)
            if options.memory is not None:
                options.memory.remember(present, new, targets.tensors)
            if rows.mask is not None:
                rows.mask.advance()
            if options.way.gramian is not None:
                options.way.gramian.advance()
        sink.finish()
        info = _info(_losses(source, targets, rows, begun), targets, outcome, kept, step_scale)
        return replace(info, conflict_agreement=rows.conflict_agreement) if isinstance(rows, ActivationRows) else info


def _losses(source: Source, targets: Targets, rows: StepRows, begun: Start | None) -> Tensor:
    """Return the losses as the user has computed them, (T,); on several ranks their means."""
    if begun is None:
        return stacked(source.values, targets.tensors[0])
    assert rows.losses is not None, "the ranks have exchanged them"
    return rows.losses if rows.loss_scale is None else rows.losses * rows.loss_scale


def _opened(source: Source, options: Options, params: Params, second: Second) -> tuple[Targets, Losses | None]:
    """Check the arguments of a step; return the parameters, and the losses of the second batch."""
    options.check()
    check_wanted(second, options.aggregator)
    targets = Targets.of(params, options.groups, options.shared)
    open_source(source, targets)
    refuse_way(source, targets, options)
    second_losses = opened(second, source, targets)
    if options.memory is not None:
        options.memory.check(len(source.present))
    return targets, second_losses


def open_source(source: Source, targets: Targets) -> None:
    """Open a source for the targets of a step."""
    source.open(targets.device)
    if not isinstance(source, Losses):
        return
    if source.has_callables:
        source.frozen = targets.frozen
    if targets.has_dtensors:
        if isinstance(source, LossesOnFeatures):
            raise NotImplementedError(
                "features= is not for DTensors in params: leave it out; through='rows' has the same result"
            )
        source.differentiate = differentiated_by_hooks


def _refuse_dtensors(targets: Targets) -> None:
    if targets.has_dtensors:
        name = next(targets.given.name(k) for k in targets.places if is_dtensor(targets.given.tensors[k]))
        raise TypeError(
            f"params must not be DTensors; {name} is one, and this step is of one rank alone: give process_group= two "
            "or more ranks, all of the DTensors' device mesh"
        )


def _check_present(present: Sequence[bool], aggregator: Aggregator) -> None:
    for t in aggregator.required:
        if t >= len(present) or not present[t]:
            raise ValueError(f"losses[{t}] must be given in every step with {aggregator!r}, got None")


def _step_scale(outcome: Outcome, options: Options) -> Tensor | None:
    """Return κ of the whole model's Gramian; None without ConflictLR."""
    if options.conflict_lr is None:
        return None
    assert outcome.gramian is not None, "rows have a Gramian"
    return options.conflict_lr.scale(outcome.gramian.sum(0))


def _info(
    losses: Tensor, targets: Targets, outcome: Outcome, kept: Tensor | None, step_scale: Tensor | None
) -> SurgeryInfo:
    M, w, cosines, attention = outcome.gramian, None, None, None
    if outcome.solution is not None:
        w, cosines, attention = outcome.solution.weights, outcome.solution.targets, outcome.solution.attention
    groups = targets.grouping.names
    if groups is None and M is not None:  # a single group has no dimension
        M, w = M[0], None if w is None else w[0]
        cosines = None if cosines is None else cosines[0]
        attention = None if attention is None else attention[0]
    if M is None and w is not None:  # weights of losses are float64
        w = w.to(losses.dtype)
    named = None if groups is None or M is None else tuple(groups)
    return SurgeryInfo(losses, M, w, cosines, attention, kept=kept, step_scale=step_scale, groups=named)
