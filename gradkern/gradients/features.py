"""One pass through a trunk that all tasks share: heads go back first, and the trunk once per task, or for all at once.

    dL_i/dθ = (dh/dθ)ᵀ dL_i/dh        h the features, θ the trunk's parameters

So the graph of a head is gone before the trunk's turn comes, and the T passes through the trunk can be one, batched.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from gradkern.gradients import graph
from gradkern.gradients.losses import Loss, Losses, Pass, differentiated, unreached

Features = Tensor | Sequence[Tensor]


class LossesOnFeatures(Losses):
    """Losses of tasks that meet nowhere below their heads but in ``features``.

    Args:
        losses: one entry per task; callables too find the features there.
        features: the trunk's output, which the heads take. Those that do not require grad have no trunk to train.
        batched: send the tasks through the trunk together, by :func:`torch.func.vmap`'s rules.
        retain_graph: keep all graphs.
    """

    one_graph_each = False

    def __init__(self, losses: Sequence[Loss], features: Features, batched: bool, retain_graph: bool) -> None:
        super().__init__(losses, retain_graph)
        self.given_features = features
        self.features: list[Tensor] = []
        self.batched = batched

    def open(self, device: torch.device) -> None:
        """Check the losses and the features.

        Raises:
            TypeError, ValueError: as :meth:`Losses.open`, or ``features`` or ``batched`` is not as said above.
        """
        super().open(device)
        if not isinstance(self.batched, bool):
            raise TypeError(f"batched must be True or False, got {self.batched!r}")
        self.features = [h for h in _checked(self.given_features) if h.requires_grad]

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Run :meth:`Losses.passes`; all heads run before the first task's gradients are there."""
        trunk = self._trunk(targets)
        below = [k for k, p in enumerate(targets) if p in trunk]
        above = [k for k, p in enumerate(targets) if p not in trunk]
        rows: dict[int, list[Tensor | None]] = {}
        tangents: dict[int, Sequence[Tensor | None]] = {}
        for i, found in self._head_passes([targets[k] for k in above], trunk):
            tangents[i] = found[: len(self.features)]
            rows[i] = [None] * len(targets)
            for k, g in zip(above, found[len(self.features) :], strict=True):
                rows[i][k] = g
        for i, found in self._trunk_passes(tangents, [targets[k] for k in below]):
            for k, g in zip(below, found, strict=True):
                rows[i][k] = g
            yield i, rows.pop(i)

    def _trunk(self, targets: Sequence[Tensor]) -> set[Tensor]:
        """The targets that the features were computed from."""
        edges = {graph.edge(h) for h in self.features}
        for k, h in enumerate(self.features):
            if graph.meets(h, edges):
                raise ValueError(f"features[{k}] is computed from another of features: give the last of them alone")
            if h._backward_hooks or h.retains_grad:
                raise ValueError(f"features[{k}] has a hook or retain_grad(), which would run twice for each task")
        graph.freeable(self.features, argument="features")  # raises for a graph that cannot be asked for gradients
        return {leaf for h in self.features for leaf in graph.leaves(h)} & set(targets)

    def _head_passes(self, heads: Sequence[Tensor], trunk: set[Tensor]) -> Iterator[Pass]:
        """Give each task's number and its gradients by the features and the heads."""
        edges = {graph.edge(h) for h in self.features}
        free = graph.freeable(self.entries, edges)
        for i, value in self.graphs():
            past = [p for p in graph.leaves(value, edges) if p in trunk]
            if past:
                raise ValueError(
                    f"losses[{i}] reaches {len(past)} of the params below features past them, by a skip connection, "
                    f"tied weights or a term of their own, such as one of shape {tuple(past[0].shape)}: leave features "
                    "out"
                )
            found = differentiated(i, [value], [*self.features, *heads], self.retain_graph or not free[i])
            if all(g is None for g in found):
                raise unreached(i)
            yield i, found
            del value  # a callable's graph ends here

    def _trunk_passes(
        self, tangents: dict[int, Sequence[Tensor | None]], targets: Sequence[Tensor]
    ) -> Iterator[tuple[int, Sequence[Tensor | None]]]:
        """Give each task's number and its gradients by the trunk.

        Only features that a task reaches make it reach a target. So tasks that reach the same features go together, and
        the last of them frees the graph.
        """
        reached = {i: [k for k, g in enumerate(found) if g is not None] for i, found in tangents.items()}
        reach = reached.__getitem__
        parties = [(which, list(tasks)) for which, tasks in groupby(sorted(reached, key=reach), reach)]
        for n, (which, tasks) in enumerate(parties):
            outputs = [self.features[k] for k in which]
            last = n == len(parties) - 1 and not self.retain_graph
            if not outputs:
                yield from ((i, [None] * len(targets)) for i in tasks)
            elif self.batched and len(tasks) > 1:  # what comes of one alone would be views, which hide shared memory
                together = [torch.stack([_there(tangents[i][k]) for i in tasks]) for k in which]
                found = torch.autograd.grad(
                    outputs, targets, together, retain_graph=not last, allow_unused=True, is_grads_batched=True
                )
                # What is no task's own, such as a hook's constant, vmap has expanded: one memory for all.
                apart = [g if g is None or g.stride(0) else g.contiguous() for g in found]
                for place, i in enumerate(tasks):
                    yield i, [None if g is None else g[place] for g in apart]
            else:
                for i in tasks:
                    by_these = [tangents[i][k] for k in which]
                    yield i, differentiated(i, outputs, targets, not (last and i == tasks[-1]), by_these)


def _there(g: Tensor | None) -> Tensor:
    assert g is not None, "tasks are grouped by what they reach"
    return g


def _checked(features: Features) -> list[Tensor]:
    given = [features] if isinstance(features, Tensor) else features
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"features must be a tensor or a sequence of tensors, got {type(features).__name__}")
    given = list(given)
    if not given:
        raise ValueError("features is empty")
    for k, h in enumerate(given):
        if not isinstance(h, Tensor):
            raise TypeError(f"features[{k}] must be a tensor, got {h!r}")
        if any(h is other for other in given[:k]):
            raise ValueError(f"features[{k}] is given twice")
    return given
