"""Backward passes through a shared trunk: first through the heads, then through the trunk, per task or batched.

    dL_i/dθ = (dh/dθ)ᵀ dL_i/dh        h the features, θ the trunk's parameters

So a head's graph is freed before the backward pass of the trunk, and the T passes through the trunk can be one batched
pass.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.gradients import aliasing, graph
from gradkern.gradients.engine import differentiated, differentiated_together
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Loss, Losses, Pass, unreached

Features = Tensor | Sequence[Tensor]


class Trunk(NamedTuple):
    """The part of the model below the features."""

    outputs: list[Tensor]
    """The features that trained parameters lie below."""
    edges: set[graph.Edge]
    """The edges where the heads' graphs end; a feature may have no trained parameter below."""
    leaves: set[Tensor]
    """The targets below."""
    heads_meet: bool
    """Whether heads may share a part of their graphs, because a feature is computed from another one."""

    def below(self, targets: Sequence[Tensor]) -> list[int]:
        """Return the places of the targets below the features."""
        return [k for k, p in enumerate(targets) if p in self.leaves]


class OfHead(NamedTuple):
    """The gradients of one task after the backward pass of its head."""

    by_outputs: Row
    """Those with respect to the trunk's outputs."""
    row: list[Tensor | None]
    """Those for the targets, None for all below the features."""


class LossesOnFeatures(Losses):
    """Losses of tasks whose heads share nothing but ``features``.

    Args:
        losses: one entry per task; callables use the same features.
        features: the output of the trunk, which the heads take. Tensors that do not require grad are ignored. What is
            computed from another of them counts as part of the heads.
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
            TypeError, ValueError: as :meth:`Losses.open`, or ``features`` is not as described above.
        """
        super().open(device)
        self.features = [h for h in _checked(self.given_features) if h.requires_grad]

    def passes(self, targets: Sequence[Tensor], keep: bool = True) -> Iterator[Pass]:
        """Run :meth:`Losses.passes`; all heads run before the first task's gradients are yielded."""
        trunk = self.trunk(targets)
        below, heads = trunk.below(targets), dict(self.head_passes(targets, trunk))
        feature_grads = {i: of_head.by_outputs for i, of_head in heads.items()}
        for i, grads in self._trunk_passes(feature_grads, [targets[k] for k in below], trunk.outputs):
            row = heads.pop(i).row
            for k, g in zip(below, grads, strict=True):
                row[k] = g
            if all(g is None for g in row) and not self.frozen_grads.get(i):
                raise unreached(i)
            yield i, row

    def trunk(self, targets: Sequence[Tensor]) -> Trunk:
        """Return the trunk, whose outputs are the features that are computed from no other one."""
        given = {graph.edge(h) for h in self.features}
        first = [(k, h) for k, h in enumerate(self.features) if not graph.meets(h, given)]
        known, leaves, outputs = set(targets), set[Tensor](), []
        for k, h in first:
            if h._backward_hooks or h.retains_grad:
                raise ValueError(f"features[{k}] has a hook or retain_grad(), which would run twice for each task")
            graph.refuse_reentrant(f"features[{k}]", h)
            below = known.intersection(graph.leaves(h))
            if below:
                leaves |= below
                outputs.append(h)
        return Trunk(outputs, {graph.edge(h) for _, h in first}, leaves, len(first) < len(self.features))

    def head_passes(self, targets: Sequence[Tensor], trunk: Trunk) -> Iterator[tuple[int, OfHead]]:
        """Yield each present task's number and what the backward pass of its head gives."""
        above, n = [k for k, p in enumerate(targets) if p not in trunk.leaves], len(trunk.outputs)
        for i, grads in self._head_passes([targets[k] for k in above], trunk):
            row: list[Tensor | None] = [None] * len(targets)
            for k, g in zip(above, grads[n:], strict=True):
                row[k] = g
            yield i, OfHead(grads[:n], row)

    def trunk_pass(self, outputs: Sequence[Tensor], seeds: Sequence[Tensor], targets: Sequence[Tensor]) -> Row:
        """Return the gradients of the trunk for ``targets``, by one backward pass.

        Args:
            outputs: outputs of the trunk.
            seeds: the gradients with respect to them.
            targets: the targets below the features.
        """
        return aliasing.copies(self.differentiate("features", tuple(outputs), targets, self.retain_graph, tuple(seeds)))

    def _head_passes(self, heads: Sequence[Tensor], trunk: Trunk) -> Iterator[Pass]:
        """Yield each task's number and its gradients with respect to the trunk's outputs and the heads."""
        last, _ = graph.clusters(self.entries, trunk.edges)
        if trunk.heads_meet and self.has_callables:  # a callable's graph ends in what others share
            last = [max(i for i, is_present in enumerate(self.present) if is_present)] * len(last)
        for i, loss in enumerate(self.entries):
            if isinstance(loss, Tensor):
                _refuse_ways_past(i, loss, trunk)
        for i, value in self.graphs():
            if callable(self.entries[i]):
                _refuse_ways_past(i, value, trunk)
            thawed = [p for p in self.frozen if p.requires_grad]
            reached, ones = [*trunk.outputs, *heads, *thawed], torch.ones_like(value)
            retain_graph = self.retain_graph or last[i] != i
            grads = aliasing.copies(differentiated(f"losses[{i}]", (value,), reached, retain_graph, (ones,)))
            yield i, self._of_targets(i, grads, thawed) if thawed else grads
            del value  # frees a callable's graph

    def _trunk_passes(
        self, feature_grads: dict[int, Row], targets: Sequence[Tensor], features: Sequence[Tensor]
    ) -> Iterator[Pass]:
        """Yield each task's number and its gradients with respect to the trunk.

        A task reaches a target only through the features that it reaches. So tasks that reach the same features form a
        group, and the last group frees the graph.
        """
        reached = {i: [k for k, g in enumerate(grads) if g is not None] for i, grads in feature_grads.items()}
        by_reached = reached.__getitem__
        groups = [(indices, list(tasks)) for indices, tasks in groupby(sorted(reached, key=by_reached), by_reached)]
        for n, (indices, tasks) in enumerate(groups):
            outputs = tuple([features[k] for k in indices])
            last = n == len(groups) - 1 and not self.retain_graph
            if not outputs:
                yield from ((i, [None] * len(targets)) for i in tasks)
            elif self.batched and len(tasks) > 1:  # a single task's gradients would be views, which hide shared memory
                stacked = [torch.stack([_not_none(feature_grads[i][k]) for i in tasks]) for k in indices]
                batch = differentiated_together("features", outputs, targets, not last, stacked)
                # vmap expands a gradient that is the same for all tasks, such as a hook's constant: they share memory.
                separate = [g if g is None or g.stride(0) else g.contiguous() for g in batch]
                for row, i in enumerate(tasks):
                    yield i, [None if g is None else g[row] for g in separate]
            else:
                for i in tasks:
                    output_grads = tuple([_not_none(feature_grads[i][k]) for k in indices])
                    retain_graph = not (last and i == tasks[-1])
                    grads = self.differentiate(f"losses[{i}]", outputs, targets, retain_graph, output_grads)
                    yield i, aliasing.copies(grads)
                    del grads  # free them before the next task's pass


def _refuse_ways_past(i: int, loss: Tensor, trunk: Trunk) -> None:
    """Raise ValueError if a loss reaches the trunk past its outputs, or hides the parameters that it reaches."""
    graph.refuse_reentrant(f"losses[{i}]", loss, trunk.edges)
    bypassed = [p for p in graph.leaves(loss, trunk.edges) if p in trunk.leaves]
    if bypassed:
        raise ValueError(
            f"losses[{i}] also reaches {len(bypassed)} of the params below features by a way past features, such as "
            f"one of shape {tuple(bypassed[0].shape)}. Compute features and losses in the same forward pass. If there "
            "is a skip connection, tied weights or a separate term, leave features out"
        )


def _not_none(g: Tensor | None) -> Tensor:
    assert g is not None, "tasks are grouped by the features that they reach"
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
