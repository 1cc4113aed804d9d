"""Backward passes of all tasks side by side, a part of the graph after another.

A pass of one task through the whole graph leaves a gradient at each layer, and dot products need those of all tasks. So
the graph is cut after each layer into segments. All tasks run one segment, then all run the next. Only the gradients at
the cut are alive in between, and those at the layers of one segment.

Hooks of tensors run in each pass, and may change a gradient. Autograd runs those of a tensor where a pass ends, and
again where the next one begins there. So a segment takes what its last nodes give, before any hook, and the next
segment begins with that.

One end of a segment may lie below another, as where a residual connection skips a block. Autograd then goes on from the
upper end to the lower one. Hooks at the ends give it no gradient, so that it computes nothing there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradkern.gradients import aliasing
from gradkern.gradients.activations.trace import Trace
from gradkern.gradients.engine import differentiated
from gradkern.gradients.graph import Edge
from gradkern.gradients.param_grads import added

OfTasks = list[Tensor | None]
"""A gradient for each of T tasks, None for one that does not reach the place."""


class _Segment(NamedTuple):
    """A part of the graph.

    Attributes:
        layers: the nodes whose incoming gradients are wanted.
        lowest: those of them that no pass runs, because nothing below is wanted.
        last: the nodes from which edges lead to later segments, and these edges by their numbers.
        below: the edges at which the segment ends.
        leaves: the leaves that its nodes use.
        finished: those of them that no later segment uses.
    """

    layers: list[Node]
    lowest: list[Node]
    last: dict[Node, dict[int, Edge]]
    below: list[Edge]
    leaves: list[Tensor]
    finished: list[Tensor]


class Walk:
    """Backward passes down a trace.

    Args:
        trace: the graphs.
        layers: the nodes whose incoming gradients are wanted.
        leaves: the leaves whose gradients are wanted.
        is_cut: whether to cut the graph after each layer. If not, all is one segment.
    """

    def __init__(self, trace: Trace, layers: Sequence[Node], leaves: Sequence[Tensor], is_cut: bool) -> None:
        self._roots = trace.roots
        self._number: dict[Node, int] = {}
        self._segments = self._cut(trace, set(layers), leaves, is_cut)
        self._current = 0
        self._found: dict[Any, Tensor] = {}
        self._stops_with_zeros = False
        self._has_stopped = False

    @property
    def sequence(self) -> list[Any]:
        """The nodes of layers and the leaves in the order in which :meth:`run` yields them."""
        return [place for segment in self._segments for place in (*segment.layers, *segment.finished)]

    def run(self, losses: Mapping[int, Tensor], n_tasks: int, retain_graph: bool) -> Iterator[tuple[Any, OfTasks]]:
        """Yield each layer's node and each leaf with the gradients of T tasks, as soon as all of them are there.

        Args:
            losses: the losses of present tasks, as the trace has them.
            n_tasks: T.
            retain_graph: whether to keep the graphs. Those that are cut are kept.
        """
        waiting = {i: {self._roots[i]: torch.ones_like(loss)} for i, loss in losses.items()}
        of_leaves: dict[Tensor, OfTasks] = {}
        hooks = [hook for segment in self._segments for hook in self._hooks(segment)]
        try:
            for s, segment in enumerate(self._segments):
                of_layers: dict[Node, OfTasks] = {node: [None] * n_tasks for node in segment.layers}
                for i, loss in losses.items():
                    is_last = len(self._segments) == 1 and i == max(losses)
                    found = self._pass(s, f"losses[{i}]", loss, waiting[i], retain_graph or not is_last)
                    for place, g in found.items():
                        if place in of_layers:
                            of_layers[place][i] = g
                        elif isinstance(place, Tensor):
                            column = of_leaves.setdefault(place, [None] * n_tasks)
                            column[i] = added(column[i], g)
                        else:
                            before = waiting[i].get(place)
                            waiting[i][place] = g if before is None else before + g
                    del found
                for node in segment.layers:
                    yield node, of_layers.pop(node)
                for p in segment.finished:
                    yield p, of_leaves.pop(p, [None] * n_tasks)
        finally:
            for hook in hooks:
                hook.remove()

    def _pass(
        self, s: int, name: str, loss: Tensor, waiting: dict[Edge, Tensor], retain_graph: bool
    ) -> dict[Any, Tensor]:
        """Run segment ``s`` for one task; return the gradients at its layers, its leaves and the edges below.

        Args:
            s: the number of the segment.
            name: the loss's name for error messages.
            loss: the loss.
            waiting: the gradients at edges, of which it takes those of the segment's own nodes.
            retain_graph: whether to keep the graph.
        """
        segment = self._segments[s]
        edges = [place for place in waiting if self._number.get(place[0]) == s]
        wanted: list[Any] = [*segment.leaves, *((node, 0) for node in segment.lowest), *segment.below]
        if not edges or not wanted:
            return {}
        outputs, grads = [GradientEdge(*place) for place in edges], tuple([waiting.pop(place) for place in edges])
        targets = [place if isinstance(place, Tensor) else GradientEdge(*place) for place in wanted]
        self._current, self._found, self._has_stopped = s, {}, False
        try:
            row = differentiated(name, outputs, targets, retain_graph, grads, (loss,))
        except Exception:
            if self._stops_with_zeros or not self._has_stopped:
                raise
            self._stops_with_zeros, self._found = True, {}  # a hook may be unable to take no gradient
            row = differentiated(name, outputs, targets, retain_graph, grads, (loss,))
        for place, g in zip(wanted[: len(segment.leaves) + len(segment.lowest)], row, strict=False):
            if g is not None:
                self._found[place if isinstance(place, Tensor) else place[0]] = g
        del row, grads
        places, taken = list(self._found), list(self._found.values())
        self._found = {}
        return dict(zip(places, aliasing.copies(taken), strict=True))

    def _hooks(self, segment: _Segment) -> Iterator[Any]:
        """Yield the handles of hooks that take the gradients at the layers of a segment and at the edges below.

        They also stop passes that end at a place below.
        """
        layers = set(segment.layers)
        for node in dict.fromkeys([*layers, *(node for node, _ in segment.below)]):
            yield node.register_prehook(lambda grads, node=node: self._enter(node, node in layers, grads))
        for node, leaving in segment.last.items():
            yield node.register_hook(lambda grads, _, node=node, leaving=leaving: self._leave(node, leaving, grads))

    def _enter(self, node: Node, is_layer: bool, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        """Take the gradient at a layer; or stop a pass that ends above the node."""
        if self._number[node] > self._current:
            self._has_stopped = True
            is_none = not self._stops_with_zeros
            return tuple([None if g is None or is_none else torch.zeros_like(g) for g in grads])
        if is_layer and self._number[node] == self._current and grads[0] is not None:
            self._found[node] = grads[0]
        return None

    def _leave(self, node: Node, leaving: Mapping[int, Edge], grads: Sequence[Tensor | None]) -> None:
        """Take the gradients that a node passes on to later segments."""
        if self._number[node] != self._current:
            return
        for number, place in leaving.items():
            g = grads[number]
            if g is not None:
                g = _fitted(g, place)
                self._found[place] = self._found[place] + g if place in self._found else g

    def _cut(self, trace: Trace, layers: set[Node], leaves: Sequence[Tensor], is_cut: bool) -> list[_Segment]:
        """Return the segments; a node is in a later one than the layers above it."""
        leaf_of = {trace.leaves[p]: p for p in leaves}
        needed = trace.above([*layers, *leaf_of])
        cuts = _cuts([node for node in trace.order if node in needed], layers, leaf_of) if is_cut else set()
        for node in trace.order:
            if node in needed:
                users = [user for user, _ in trace.users[node] if user in needed]
                self._number[node] = max([self._number[user] + (user in cuts) for user in users], default=0)
        segments = [_Segment([], [], {}, [], [], []) for _ in range(1 + max(self._number.values(), default=0))]
        for node, s in self._number.items():
            if node in leaf_of:
                uses = {self._number[user] for user, _ in trace.users[node]}
                for n in uses:
                    segments[n].leaves.append(leaf_of[node])
                segments[max(uses)].finished.append(leaf_of[node])
                continue
            below = {k: (n, at) for k, (n, at) in enumerate(node.next_functions) if n is not None and n in needed}
            leaving = {k: (n, at) for k, (n, at) in below.items() if self._number[n] > s and n not in leaf_of}
            if node in layers:
                segments[s].layers.append(node)
                if not below:
                    segments[s].lowest.append(node)
            if leaving:
                segments[s].last[node] = leaving
                segments[s].below.extend(leaving.values())
        for segment in segments:
            segment.below[:] = dict.fromkeys(segment.below)
        return segments


def _cuts(order: Sequence[Node], layers: set[Node], leaf_of: Mapping[Node, Tensor]) -> set[Node]:
    """Return the nodes after which the graph is cut: layers, and nodes at which the rows of a matrix come in.

    The rows of vectors are no larger than what is at their layer. There is no cut if a module has a full backward hook:
    torch pairs what one pass brings to the module's output with what the next one brings to its input.

    Args:
        order: the nodes that passes run, each before those below it.
        layers: the nodes of layers.
        leaf_of: the leaves that have rows, by their nodes.
    """
    if any(node.name() == "BackwardHookFunctionBackward" for node in order):
        return set()
    known, cuts = set(order), set(layers)
    only: dict[Node, Tensor] = {}  # the leaf below a node, where there is one alone
    for node in reversed(order):
        if node in leaf_of:
            only[node] = leaf_of[node]
            continue
        below = [other for other, _ in node.next_functions if other is not None and other in known]
        leaves = {only.get(other) for other in below}
        if len(leaves) == 1 and None not in leaves and node not in layers:
            only[node] = only[below[0]]
        elif any(p is not None and p.ndim > 1 for p in leaves):
            cuts.add(node)
    return cuts


def _fitted(g: Tensor, place: Edge) -> Tensor:
    """Return a gradient as autograd passes it on: what was broadcast added up, and in the dtype of the place."""
    node, number = place
    meta: Any = node._input_metadata[number]
    shape = tuple(meta.shape)
    fitted = g if tuple(g.shape) == shape else g.sum_to_size(shape)
    return fitted if fitted.dtype == meta.dtype else fitted.to(meta.dtype)
