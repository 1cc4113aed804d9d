"""The gradients of parameters as factors: what went into each layer, and what came back from each task."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.activations.layers import layers_of
from gradkern.gradients.activations.products import Passed, Weight
from gradkern.gradients.activations.read import read
from gradkern.gradients.activations.walk import OfTasks, Walk
from gradkern.gradients.parameters import Targets


class Found(NamedTuple):
    """The gradients of a parameter, of all tasks.

    Attributes:
        place: the number of the parameter.
        weight: the parameter, if it has factors; None for one with rows.
        passed: what has passed through those of a weight's layers that any task reaches.
        rows: T gradients; for a weight T gradients at each of these layers.
    """

    place: int
    weight: Weight | None
    passed: list[Passed]
    rows: list[OfTasks]

    @property
    def tasks(self) -> list[int]:
        """The tasks that have a gradient."""
        return [t for t, grads in enumerate(zip(*self.rows, strict=True)) if any(g is not None for g in grads)]


class Factors:
    """The backward passes that find the factors of weights, and the rows of other parameters.

    Args:
        graphs: the graphs of the losses.
        targets: the parameters.
        weights: those that are to have factors.
        wanted: the places of these and of others.
        is_cut: whether to go down a layer at a time.

    Raises:
        ValueError: as :func:`gradkern.gradients.activations.read.read`.
    """

    def __init__(
        self, graphs: Graphs, targets: Targets, weights: Sequence[Weight], wanted: Sequence[int], is_cut: bool
    ) -> None:
        self._graphs = graphs
        self._targets = targets
        self._weights = weights
        self._layers = {layer.node: (layer, weight) for weight in weights for layer in weight.layers}
        inputs = read([layer for layer, _ in self._layers.values()], list(graphs.losses.values()))
        self._inputs = dict(zip(self._layers, inputs, strict=True))
        known = {weight.place for weight in weights}
        self._places = {graphs.leaves[k]: k for k in wanted if k not in known and graphs.tasks[k]}
        self._walk = Walk(graphs.trace, [*self._layers], [*self._places], is_cut)

    @property
    def sequence(self) -> list[int]:
        """The places of the parameters in the order in which :meth:`run` finds them."""
        missing = {weight.place: len(weight.layers) for weight in self._weights}
        places = []
        for place in self._walk.sequence:
            if isinstance(place, Tensor):
                places.append(self._places[place])
                continue
            _, weight = self._layers[place]
            missing[weight.place] -= 1
            if not missing[weight.place]:
                places.append(weight.place)
        return places

    def run(self, retain_graph: bool) -> Iterator[Found]:
        """Yield each parameter as soon as all its gradients are there.

        Raises:
            ValueError: a task alone has a gradient of a parameter that the graph shows below several. A node with
                several results shows so if losses come from different ones of them.
        """
        for found in self._found(retain_graph):
            if len(found.tasks) == 1 < len(self._graphs.tasks[found.place]):
                name = self._targets.name(found.place)
                raise ValueError(
                    f"losses[{found.tasks[0]}] alone has a gradient of {name} in params, but a node above that has "
                    "results for other losses too, as DistributedDataParallel(find_unused_parameters=True) has: make "
                    "it with find_unused_parameters=False, which serves here as well, or give through='rows'"
                )
            yield found

    def _found(self, retain_graph: bool) -> Iterator[Found]:
        waiting: dict[int, list[Passed]] = {weight.place: [] for weight in self._weights}
        for place, grads in self._walk.run(self._graphs.losses, self._graphs.n_tasks, retain_graph):
            if isinstance(place, Tensor):
                yield Found(self._places[place], None, [], [grads])
                continue
            layer, weight = self._layers[place]
            waiting[weight.place].append(Passed(layer, self._inputs.pop(place), grads))
            if len(waiting[weight.place]) == len(weight.layers):
                passed = [one for one in waiting.pop(weight.place) if any(g is not None for g in one.grads)]
                yield Found(weight.place, weight, passed, [one.grads for one in passed])


def weights_of(graphs: Graphs, places: Sequence[int]) -> list[Weight]:
    """Return the parameters at some places that are used as matrices only.

    Raises:
        ValueError: as :func:`gradkern.gradients.activations.read.read`.
    """
    found = [Weight(p := graphs.leaves[k], k, layers_of(graphs.trace, p)) for k in places if graphs.tasks[k]]
    weights = [weight for weight in found if weight.layers]
    read([layer for weight in weights for layer in weight.layers], list(graphs.losses.values()))
    return weights
