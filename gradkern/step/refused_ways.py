"""Refusals of steps through activations or features, before any pass runs."""

from collections.abc import Iterator

from gradkern.distributed.gathered import leaves_of
from gradkern.gradients.features import LossesOnFeatures
from gradkern.gradients.losses import Losses, Source
from gradkern.gradients.parameters import Targets
from gradkern.step.options import Options

Refusal = tuple[str, str]
"""The argument that is refused, with its value; and the remedy."""


def refuse_way(source: Source, targets: Targets, options: Options) -> None:
    """Raise unless the step's way goes together with its losses, method and modifiers.

    Raises:
        ValueError: it does not; the message says what to give instead.
        NotImplementedError: it does not yet with DTensors.
    """
    through = options.way.through
    if through == "rows":
        return
    if through == "features" and not isinstance(source, LossesOnFeatures):
        raise ValueError(
            "through='features' needs features=, the output of the trunk that all tasks share; or give through='rows'"
        )
    refuse_options(options)
    _refuse(through, _of_features(source) if through == "features" else _of_activations(source, targets))
    if targets.has_dtensors:
        if through == "features" or options.way.finish == "kept":
            way = "through='features'" if through == "features" else "finish='kept'"
            raise NotImplementedError(f"{way} is not for DTensors in params yet: give through='rows'")
        leaves_of(targets.tensors, targets.device, targets.name)


def refuse_options(options: Options) -> None:
    """Raise ValueError unless the way of steps goes together with their method and modifiers."""
    through = options.way.through
    if through != "rows":
        _refuse(through, _with_rows(options))
        _refuse(through, _without_features(options) if through == "features" else _without_activations(options))


def _refuse(through: str, refused: Iterator[Refusal]) -> None:
    for what, instead in refused:
        raise ValueError(f"through={through!r} does not go together with {what}: {instead}")


def _of_activations(source: Source, targets: Targets) -> Iterator[Refusal]:
    rows = "give through='rows'"
    if not isinstance(source, Losses) or source.has_callables:
        yield "losses that are callables", f"compute tensors, in one forward pass of all tasks, or {rows}"
    if isinstance(source, LossesOnFeatures) and source.batched:
        yield "batched=True", "leave it out"
    for k, p in enumerate(targets.tensors):
        if p._backward_hooks:
            yield f"the hook of parameter {targets.name(k)}, which changes its gradient for one task", rows
    if targets.layouts.lazy:
        yield "params that have no shapes yet", "run lazy modules once before the step"


def _without_activations(options: Options) -> Iterator[Refusal]:
    suppression, way = options.suppression, options.way
    if suppression is not None and suppression.scope == "all":
        yield f"suppression={suppression!r}, whose mask needs entries of each gradient", "give scope='update'"
    if suppression is not None and way.finish == "backward":
        yield f"suppression={suppression!r} and finish='backward', which masks nothing", "give finish='kept'"
    if options.groups != "model" and way.finish == "backward":
        groups = f"groups={options.groups!r} and finish='backward', whose one pass has one weight for each task"
        yield groups, "give finish='kept'"


def _of_features(source: Source) -> Iterator[Refusal]:
    assert isinstance(source, LossesOnFeatures), "others are refused"
    if source.batched:
        yield "batched=True, as the trunk has one pass for all tasks", "leave it out"


def _without_features(options: Options) -> Iterator[Refusal]:
    rows = "give through='rows'"
    if options.suppression is not None:
        yield f"suppression={options.suppression!r}, whose mask lies over the task gradients", rows
    if options.groups != "model":
        yield f"groups={options.groups!r}, as the features have one Gramian for all parameters below", rows
    if options.shared is not None:
        yield (
            "shared, as surgery is for all parameters below the features, and for no others",
            f"leave it out, or {rows}",
        )


def _with_rows(options: Options) -> Iterator[Refusal]:
    """Yield what needs the rows of the task gradients, and is there by no other way."""
    method, rows = options.aggregator, "give through='rows'"
    if method.needs_entries:
        yield f"aggregator={method!r}, which looks at entries of the task gradients", rows
    if method.averages_rows:
        yield f"aggregator={method!r}, which keeps running means of the task gradients", rows
    if method.needs_second:
        yield f"aggregator={method!r}, which needs dot products with a second batch's gradients", rows
    if options.memory is not None:
        yield "memory=True, which keeps the task gradients", rows
