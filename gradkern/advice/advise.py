"""A look at one step: every way is rehearsed on the user's own losses, and nothing changes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch.nn.parameter import is_lazy

from gradkern.advice.advice import Advice
from gradkern.advice.cost import Cost
from gradkern.advice.memory import is_measurable, peak
from gradkern.advice.rehearsal import SinkOf, leaving_no_trace
from gradkern.advice.seconds import medians
from gradkern.advice.trial import Trial
from gradkern.advice.ways import Candidate, candidates
from gradkern.aggregators import Aggregator
from gradkern.gradients.features import Features
from gradkern.gradients.losses import Loss, entries_of
from gradkern.gradients.parameters import Groups, Params, Targets
from gradkern.modifiers.suppression import Suppression
from gradkern.step.backward import grad_sink
from gradkern.step.options import Options
from gradkern.step.pipeline import outside_inference_mode

LAST_PASS = "it ends in torch's own backward pass, which would write .grad: that is predicted to be as plain's"
NO_SURGERY = "no surgery: it is torch's own backward pass of the weighted sum of the losses"


class Measured(NamedTuple):
    """The median of a run's seconds, and its peak memory in bytes, None where that cannot be told."""

    seconds: float
    memory: int | None


def advise(
    losses: Sequence[Loss],
    params: Params,
    *,
    aggregator: Aggregator,
    groups: Groups = "model",
    shared: Params | None = None,
    suppression: Suppression | None = None,
    features: Features | None = None,
) -> Advice:
    """Return what each way of a step costs on these losses, and which one to take.

    Each way is rehearsed: it runs up to where it would write, five times or more, and the median of its times and its
    peak memory are compared with those of plain training's backward pass. All graphs are kept meanwhile, so the peaks
    of a step that frees them are lower, on every way. Every ``.grad``, the parameters, the state of the method and of
    its modifiers, and the default generators of torch and Python stay as they are, and the graphs of the losses stay
    usable.

    Callables run in every rehearsal, with whatever they do besides: a forward pass moves the statistics of BatchNorm.
    Hooks of tensors run too. On a GPU the peak statistics of torch's allocator start anew. On several ranks the step is
    that of this rank alone, with no messages.

    Args:
        losses, params, aggregator, groups, shared, suppression, features: as in :func:`gradkern.backward`. Ways that
            need ``features`` are not possible without them.

    Returns:
        The costs of all ways. ``print`` shows them as a table. ``.best.arguments`` are the arguments of the way to
        take: the fastest with the update of the rows, and the one with the least memory of those within 5 % of it.

    Raises:
        TypeError, ValueError: as for :func:`gradkern.backward`; also if the method needs a second batch.
        NotImplementedError: ``params`` holds DTensors.
    """
    options = Options(aggregator, groups, _again(shared), suppression)
    return advised(losses, features, options, _again(params), grad_sink)


@outside_inference_mode
def advised(
    losses: Sequence[Loss], features: Features | None, options: Options, params: Params, sink_of: SinkOf
) -> Advice:
    """Return the costs of all ways.

    Args:
        losses, params, features: as for :func:`advise`; all of ``params`` are read several times.
        options: the method and its modifiers.
        sink_of: chooses the sink of a step.
    """
    options.check()
    method = options.aggregator
    if method.needs_second:
        raise ValueError(f"aggregator {method!r} needs a second batch, which advise does not take: it goes by rows")
    targets = Targets.of(params, options.groups, options.shared)
    if targets.has_dtensors:
        raise NotImplementedError("advise is not for DTensors in params, whose steps are of all ranks of their mesh")
    if targets.device.type == "meta":
        raise ValueError("params must have numbers for advise, which measures; got the device meta")
    alone = replace(options, process_group=False, shard_optimizer=False)
    trial = Trial(entries_of("losses", losses), features, params, targets, alone, sink_of)
    with leaving_no_trace(targets.device):
        return _compared(trial)


def _compared(trial: Trial) -> Advice:
    ways, device = candidates(), trial.targets.device
    refusals = [trial.refusal(way) for way in ways]
    tried = [way for way, refusal in zip(ways, refusals, strict=True) if refusal is None]
    runs: list[Callable[[], None]] = [trial.plain, *(partial(trial.rehearse, way) for way in tried)]
    trial.plain()  # as the others have run once
    seconds = medians(runs, device)
    peaks = [peak(run, device) for run in runs] if is_measurable(device) else [None] * len(runs)
    of_plain, *of_ways = map(Measured, seconds, peaks)
    found = iter(of_ways)
    return Advice(
        tuple([_cost(trial, way, refusal, found, of_plain) for way, refusal in zip(ways, refusals, strict=True)]),
        method=repr(trial.options.aggregator),
        n_tasks=trial.n_tasks,
        parameter_bytes=sum(p.numel() * p.element_size() for p in trial.targets.tensors if not is_lazy(p)),
        plain_seconds=of_plain.seconds,
        plain_passes=trial.plain_passes,
    )


def _cost(trial: Trial, way: Candidate, refusal: str | None, found: Iterator[Measured], plain: Measured) -> Cost:
    """Return what a way costs; the next of ``found`` is its own if it is not refused."""
    common = way.name, way.arguments, way.takes_features, not way.inexact
    if refusal is not None:
        return Cost(*common, "refused", (refusal,))
    seconds, memory = next(found)
    notes, status = [way.inexact] if way.inexact else [], "measured"
    if trial.only_weighs:
        notes.append(NO_SURGERY)
    elif trial.ends_in_backward(way):
        notes.append(LAST_PASS)
        status, seconds = "predicted", seconds + plain.seconds
        memory = None if memory is None or plain.memory is None else max(memory, plain.memory)
    above = None if memory is None or plain.memory is None else memory - plain.memory
    return Cost(*common, status, tuple(notes), above, *trial.passes(way), seconds / plain.seconds)


def _again(params: Params | None) -> Any:
    """Return parameters that can be read several times."""
    return list(params) if isinstance(params, Iterator) else params
