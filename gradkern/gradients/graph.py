"""Searches of autograd graphs before a step runs them. Each search visits a node once."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]


def freeable(losses: Sequence[object], cut: Collection[Edge] = (), argument: str = "losses") -> list[bool]:
    """Return for each loss whether its own backward pass may free its graph; True for entries that are not tensors.

    Losses that share nodes form a cluster, and the last of a cluster frees the shared nodes. Parameters do not count,
    because they hold no activations. Graphs end at the edges ``cut``. Error messages call ``losses`` ``argument``.

    Raises:
        ValueError: a graph holds reentrant activation checkpointing, for which autograd.grad cannot compute gradients.
    """
    cluster = list(range(len(losses)))  # union-find: every loss leads to the latest one of its cluster
    owner: dict[Node, int] = {}

    def latest(i: int) -> int:
        while cluster[i] != i:
            i = cluster[i]
        return i

    for i, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            continue
        for node in _nodes(loss, owner, cut):
            if _leaf(node) is not None:
                continue
            if node in owner:
                cluster[latest(owner[node])] = i
            else:
                _refuse_reentrant(f"{argument}[{i}]", node)
            owner[node] = i
    return [latest(i) == i for i in range(len(losses))]


def refuse_reentrant(i: int, loss: Tensor) -> None:
    """Raise ValueError if the graph of ``losses[i]`` holds reentrant activation checkpointing.

    Such checkpointing hides the parameters it uses, and autograd would report that the loss does not reach them.
    """
    for node in _nodes(loss, ()):
        _refuse_reentrant(f"losses[{i}]", node)


def leaves(loss: Tensor, cut: Collection[Edge] = ()) -> Iterator[Tensor]:
    """Yield the leaf tensors that ``loss`` was computed from and that require grad, the nearest first."""
    return (leaf for node in _nodes(loss, (), cut) if (leaf := _leaf(node)) is not None)


def edge(x: Tensor) -> Edge:
    """Return the edge that ``x`` is in its graph: a node, and the number of the node's output."""
    found = get_gradient_edge(x)
    return found.node, found.output_nr


def meets(x: Tensor, edges: Collection[Edge]) -> bool:
    """Return whether ``x`` was computed from a tensor at one of ``edges``."""
    return any((n, k) in edges for node in _nodes(x, ()) for n, k in node.next_functions)


def _nodes(loss: Tensor, known: Collection[Node], cut: Collection[Edge] = ()) -> Iterator[Node]:
    """Yield each node below ``loss`` once, depth first, but none below ``known`` nodes or from the edges ``cut`` on."""
    root, k = edge(loss)
    stack, seen = ([] if (root, k) in cut else [root]), {root}
    while stack:
        node = stack.pop()
        is_new = node not in known  # before the caller adds it
        yield node
        if is_new:
            below = [n for n, k in node.next_functions if n is not None and n not in seen and (n, k) not in cut]
            seen.update(below)
            stack.extend(below)


def _refuse_reentrant(name: str, node: Node) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            f"{name} runs through reentrant activation checkpointing, which cannot give the gradients of one "
            "task: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def _leaf(node: Any) -> Tensor | None:
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
