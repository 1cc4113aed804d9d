"""Searches of autograd graphs before a step runs them. Each search visits a node once."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]


class Meeting(NamedTuple):
    """A node below two losses, and the ways to it: which edge to follow at each node, from the loss on."""

    first: int
    from_first: tuple[int, ...]
    second: int
    from_second: tuple[int, ...]


def meet_again(losses: Sequence[Any], meetings: Sequence[Meeting]) -> bool:
    """Return whether losses, all of them tensors, meet at the same places as the losses of another step."""
    for first, from_first, second, from_second in meetings:
        ends = []
        for node, way in ((losses[first].grad_fn, from_first), (losses[second].grad_fn, from_second)):
            for number in way:
                edges = () if node is None else node.next_functions
                node = edges[number][0] if number < len(edges) else None
            ends.append(node)
        if ends[0] is not ends[1] or ends[0] is None or _leaf(ends[0]) is not None:
            return False
    return True


def clusters(losses: Sequence[object], cut: Collection[Edge] = ()) -> tuple[list[int], list[Meeting]]:
    """Return for each loss the last loss of its cluster, and the meetings that make the clusters.

    Losses that share nodes form a cluster. Parameters do not count, because they hold no activations. Entries that are
    not tensors are alone. Graphs end at the edges ``cut``.

    All losses are searched in turns, a node each. So heads of one trunk are found to meet near their ends, and the
    search ends where all losses have met.
    """
    owner: dict[Node, int] = {}
    searches = {i: _Search(loss, cut, owner) for i, loss in enumerate(losses) if isinstance(loss, Tensor)}
    unfinished = dict(searches)
    cluster = list(range(len(losses)))  # union-find: every loss leads to the latest one of its cluster
    meetings: list[Meeting] = []

    def latest(i: int) -> int:
        while cluster[i] != i:
            i = cluster[i]
        return i

    while unfinished and len(meetings) < len(searches) - 1:
        for i, search in list(unfinished.items()):
            node = next(search, None)
            if node is None:
                del unfinished[i]
            elif _leaf(node) is None:
                j = owner.setdefault(node, i)
                a, b = latest(i), latest(j)
                if a != b:
                    cluster[min(a, b)] = max(a, b)
                    meetings.append(Meeting(i, search.way_to(node), j, searches[j].way_to(node)))
    return [latest(i) for i in range(len(losses))], meetings


def refuse_reentrant(name: str, x: Tensor, cut: Collection[Edge] = ()) -> None:
    """Raise ValueError if the graph of ``x``, up to the edges ``cut``, holds reentrant activation checkpointing.

    Such checkpointing hides the parameters it uses: autograd would report that they are not reached, or raise.
    """
    if hides_parameters(_Search(x, cut)):
        raise ValueError(
            f"{name} runs through reentrant activation checkpointing, which cannot give the gradients of one "
            "task: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def hides_parameters(nodes: Iterable[Node]) -> bool:
    """Return whether any of ``nodes`` is of reentrant activation checkpointing."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes)


def refuse_static_graph(name: str, x: Tensor) -> None:
    """Raise ValueError if the graph of ``x`` holds a DistributedDataParallel with a static graph.

    Its sink reduces gradients within the backward pass of one task.
    """
    for node in _Search(x):
        module: Any = getattr(node, "ddp_weakref", None)
        if module is not None and getattr(module(), "static_graph", False):
            raise ValueError(
                f"{name} runs through DistributedDataParallel(static_graph=True), which reduces gradients within the "
                "backward pass of one task: make it with static_graph=False"
            )


def is_compiled(outputs: Sequence[Tensor]) -> bool:
    """Return whether any of ``outputs`` was computed by code of ``torch.compile``."""
    return any(node.name() == "CompiledFunctionBackward" for x in outputs for node in _Search(x))


def leaves(loss: Tensor, cut: Collection[Edge] = ()) -> Iterator[Tensor]:
    """Yield the leaf tensors that ``loss`` was computed from and that require grad, the nearest first."""
    return (leaf for node in _Search(loss, cut) if (leaf := _leaf(node)) is not None)


def uses(outputs: Sequence[Tensor]) -> Iterator[tuple[Node, int, Tensor]]:
    """Yield each use of a leaf tensor that requires grad: the node, the number of its argument, and the leaf."""
    known: set[Node] = set()
    for x in outputs:
        for node in _Search(x, known=known):
            if node in known:
                continue
            known.add(node)
            for number, (below, _) in enumerate(node.next_functions):
                leaf = None if below is None else _leaf(below)
                if leaf is not None:
                    yield node, number, leaf


def edge(x: Tensor) -> Edge:
    """Return the edge that ``x`` is in its graph: a node, and the number of the node's output."""
    found = get_gradient_edge(x)
    return found.node, found.output_nr


def meets(x: Tensor, edges: Collection[Edge]) -> bool:
    """Return whether ``x`` was computed from a tensor at one of ``edges``."""
    return any((n, k) in edges for node in _Search(x) for n, k in node.next_functions)


class _Search(Iterator[Node]):
    """A search of the nodes below ``x``, depth first, but not below ``known`` nodes or along the edges ``cut``."""

    def __init__(self, x: Tensor, cut: Collection[Edge] = (), known: Collection[Node] = ()) -> None:
        root, k = edge(x)
        self._stack = [] if (root, k) in cut else [root]
        self._above: dict[Node, tuple[Node, int] | None] = {root: None}
        self._cut = cut
        self._known = known

    def __next__(self) -> Node:
        if not self._stack:
            raise StopIteration
        node = self._stack.pop()
        if node not in self._known:
            for number, (below, k) in enumerate(node.next_functions):
                if below is not None and below not in self._above and not (self._cut and (below, k) in self._cut):
                    self._above[below] = (node, number)
                    self._stack.append(below)
        return node

    def way_to(self, node: Node) -> tuple[int, ...]:
        """Return the number of the edge to follow at each node, from ``x`` to a node that has been found."""
        way: list[int] = []
        while (step := self._above[node]) is not None:
            node, number = step
            way.append(number)
        return tuple(reversed(way))


def _leaf(node: Any) -> Tensor | None:
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
