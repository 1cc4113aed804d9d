"""Searches of autograd graphs before a step runs them. Each search visits a node once."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]


def freeable(losses: Sequence[object], cut: Collection[Edge] = ()) -> list[bool]:
    """Return for each loss whether its own backward pass may free its graph; True for entries that are not tensors.

    Losses that share nodes form a cluster, and the last of a cluster frees the shared nodes. Parameters do not count,
    because they hold no activations. Graphs end at the edges ``cut``.

    All losses are searched in turns, a node each. So heads of one trunk are found to meet near their ends, and the
    search ends where all losses have met.
    """
    owner: dict[Node, int] = {}
    graphs = {i: _nodes(loss, cut, owner) for i, loss in enumerate(losses) if isinstance(loss, Tensor)}
    cluster = list(range(len(losses)))  # union-find: every loss leads to the latest one of its cluster
    n_clusters = len(graphs)

    def latest(i: int) -> int:
        while cluster[i] != i:
            i = cluster[i]
        return i

    while graphs and n_clusters > 1:
        for i, nodes in list(graphs.items()):
            node = next(nodes, None)
            if node is None:
                del graphs[i]
            elif _leaf(node) is None:
                a, b = latest(owner.setdefault(node, i)), latest(i)
                if a != b:
                    cluster[min(a, b)] = max(a, b)
                    n_clusters -= 1
    return [latest(i) == i for i in range(len(losses))]


def refuse_reentrant(name: str, x: Tensor, cut: Collection[Edge] = ()) -> None:
    """Raise ValueError if the graph of ``x``, up to the edges ``cut``, holds reentrant activation checkpointing.

    Such checkpointing hides the parameters it uses: autograd would report that they are not reached, or raise.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(x, cut)):
        raise ValueError(
            f"{name} runs through reentrant activation checkpointing, which cannot give the gradients of one "
            "task: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def leaves(loss: Tensor, cut: Collection[Edge] = ()) -> Iterator[Tensor]:
    """Yield the leaf tensors that ``loss`` was computed from and that require grad, the nearest first."""
    return (leaf for node in _nodes(loss, cut) if (leaf := _leaf(node)) is not None)


def edge(x: Tensor) -> Edge:
    """Return the edge that ``x`` is in its graph: a node, and the number of the node's output."""
    found = get_gradient_edge(x)
    return found.node, found.output_nr


def number(loss: object) -> int:
    """Return the number of the node that made a loss; autograd counts the nodes of a thread."""
    node = loss.grad_fn if isinstance(loss, Tensor) else None
    return 0 if node is None else node._sequence_nr()


def meets(x: Tensor, edges: Collection[Edge]) -> bool:
    """Return whether ``x`` was computed from a tensor at one of ``edges``."""
    return any((n, k) in edges for node in _nodes(x) for n, k in node.next_functions)


def _nodes(loss: Tensor, cut: Collection[Edge] = (), known: Collection[Node] = ()) -> Iterator[Node]:
    """Yield each node below ``loss`` once, depth first, but none below ``known`` nodes or from the edges ``cut`` on."""
    root, k = edge(loss)
    stack, seen = ([] if (root, k) in cut else [root]), {root}
    while stack:
        node = stack.pop()
        is_new = node not in known  # before the caller adds it
        yield node
        if is_new:
            for n, k in node.next_functions:
                if n is not None and n not in seen and not (cut and (n, k) in cut):
                    seen.add(n)
                    stack.append(n)


def _leaf(node: Any) -> Tensor | None:
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
