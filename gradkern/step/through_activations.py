"""The first half of a step through activations: it walks the graphs of the losses, and adds up the Gramian."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.activations.layers import layers_of
from gradkern.gradients.activations.products import Passed, Weight
from gradkern.gradients.activations.read import read
from gradkern.gradients.activations.walk import OfTasks, Walk
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Losses
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.step.activation_rows import ActivationRows, KeptRows
from gradkern.step.gather import losses_of, of_one_kind, tells_absent, units_of
from gradkern.step.gramians import Gramians
from gradkern.step.options import Options
from gradkern.step.rows import Rows


class _Found(NamedTuple):
    """The gradients of a parameter, of all tasks.

    Attributes:
        place: the number of the parameter.
        weight: the parameter, if it is used as a matrix; None for one with rows.
        passed: what has passed through a weight's layers.
        rows: T gradients, or for a weight those at its layers.
    """

    place: int
    weight: Weight | None
    passed: list[Passed]
    rows: list[OfTasks]

    @property
    def tasks(self) -> list[int]:
        """The tasks that have a gradient."""
        return [t for t, grads in enumerate(zip(*self.rows, strict=True)) if any(g is not None for g in grads)]


def through_activations(source: Losses, targets: Targets, options: Options) -> ActivationRows:
    """Return what a step needs of its task gradients; most of these are not made.

    Args:
        source: the losses, opened: tensors of one forward pass.
        targets: the parameters.
        options: the method and its modifiers.
    """
    graphs = Graphs(source, targets)
    with torch.no_grad():
        if options.way.finish == "kept":
            return _kept(graphs, source, targets, options)
        return _streamed(graphs, source, targets, options)


def _streamed(graphs: Graphs, source: Losses, targets: Targets, options: Options) -> ActivationRows:
    """Add up the Gramian while the gradients pass, and keep none of them."""
    shared = [k for k, tasks in enumerate(graphs.tasks) if len(tasks) > 1]
    named = shared if targets.named is None else [k for k, is_named in enumerate(targets.named) if is_named]
    if [k for k in named if graphs.tasks[k]] != shared:
        raise ValueError(
            "shared must be the parameters that two losses reach, or be left out, with through='activations' and "
            "finish='backward', whose one backward pass has one weight for all that tasks share: give finish='kept'"
        )
    weights = [weight for k in shared if (weight := _weight(graphs, targets, k)).layers]
    gramians = Gramians(targets, shared, graphs.n_tasks, options.way.gramian)
    for found in _walked(graphs, source, targets, weights, shared, is_cut=True):
        if len(found.tasks) < 2 and targets.named is None:
            continue
        if found.weight is None:
            gramians.add_row(found.place, found.rows[0])
        else:
            gramians.add(found.weight, found.passed)
    reach = [[torch.strided if t in tasks else None for tasks in graphs.tasks] for t in range(graphs.n_tasks)]
    arrangement = targets.arranged(tuple(map(tuple, reach)), None, None)
    of_step = _of_step(source, targets, options)
    return ActivationRows(targets.tensors, graphs, arrangement, gramians.M, gramians.exact, **of_step)


def _kept(graphs: Graphs, source: Losses, targets: Targets, options: Options) -> KeptRows:
    """Keep what passes through layers of all tasks, and the rows of other parameters."""
    T, n = graphs.n_tasks, len(targets.tensors)
    reached = [k for k, tasks in enumerate(graphs.tasks) if tasks]
    shared = [k for k in reached if (len(graphs.tasks[k]) > 1 if targets.named is None else targets.named[k])]
    used = [_weight(graphs, targets, k) for k in shared]
    weights = [weight for weight in used if weight.is_cheaper_without_rows(T, options.way.gramian)]
    kept: list[_Found] = []
    new: list[list[Tensor | None]] = [[None] * n for _ in range(T)]
    for found in _walked(graphs, source, targets, weights, reached, is_cut=False):
        if found.weight is not None:
            kept.append(found)
            continue
        for t, g in enumerate(found.rows[0]):
            new[t][found.place] = g
    rows: list[Row] = [readable(row, targets.tensors, targets.layouts) for row in new]
    of_kept = {found.place: found.tasks for found in kept}
    reach = [list(targets.layouts.reach_of(row)) for row in rows]
    for k, tasks in of_kept.items():
        for t in tasks:
            reach[t][k] = torch.strided
    arrangement = targets.arranged(tuple(map(tuple, reach)), None, units_of(options, targets))
    own = arrangement.of(c for c in arrangement.columns if c.place not in of_kept)
    of_step = _of_step(source, targets, options)
    of_others = Rows(targets.tensors, of_one_kind(rows, arrangement, targets), own, overwrite=True)
    gramians = Gramians(targets, shared, T, options.way.gramian)
    gramians.add_rows(of_others.gramian(False))
    for found in kept:
        if found.weight is not None and (len(found.tasks) > 1 or targets.named is not None):
            gramians.add(found.weight, found.passed)
    return KeptRows(
        targets.tensors,
        graphs,
        arrangement,
        gramians.M,
        gramians.exact,
        **of_step,
        mask=None if options.suppression is None else options.suppression.mask(targets.device),
        factors=[(found.weight, found.passed) for found in kept if found.weight is not None],
        rows=of_others,
    )


def _weight(graphs: Graphs, targets: Targets, k: int) -> Weight:
    """Return a parameter with its layers, of which there are none if it is used in a way that is not known."""
    p = targets.tensors[k]
    return Weight(p, k, layers_of(graphs.trace, p))


def _walked(
    graphs: Graphs, source: Losses, targets: Targets, weights: Sequence[Weight], wanted: Sequence[int], is_cut: bool
) -> Iterator[_Found]:
    """Yield the parameters at the places ``wanted`` with their gradients, as factors for ``weights``.

    Args:
        graphs: the graphs.
        source: the losses.
        targets: the parameters.
        weights: the parameters that are used as matrices.
        wanted: the places of these and of others.
        is_cut: whether to go down a layer at a time.
    """
    layers = {layer.node: (layer, weight) for weight in weights for layer in weight.layers}
    inputs = dict(zip(layers, read([layer for layer, _ in layers.values()], [*graphs.losses.values()]), strict=True))
    known = {weight.place for weight in weights}
    places = {targets.tensors[k]: k for k in wanted if k not in known and graphs.tasks[k]}
    waiting: dict[int, list[Passed]] = {weight.place: [] for weight in weights}
    walk = Walk(graphs.trace, [*layers], [*places], is_cut)
    for place, grads in walk.run(graphs.losses, graphs.n_tasks, source.retain_graph):
        if isinstance(place, Tensor):
            yield _Found(places[place], None, [], [grads])
            continue
        layer, weight = layers[place]
        waiting[weight.place].append(Passed(layer, inputs.pop(place), grads))
        if len(waiting[weight.place]) == len(weight.layers):
            passed = waiting.pop(weight.place)
            reached = [one for one in passed if any(g is not None for g in one.grads)]
            if reached:
                yield _Found(weight.place, weight, reached, [one.grads for one in reached])


def _of_step(source: Losses, targets: Targets, options: Options) -> dict[str, Any]:
    """Return what a method needs besides the Gramian."""
    told = tells_absent(source.present, options)
    return {
        "n_tasks": len(source.present),
        "present": bools_on(source.present, targets.device) if told else None,
        "losses": losses_of(source, targets, options),
        "loss_scale": source.loss_scale,
    }
