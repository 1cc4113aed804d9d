"""What a step has to know of the autograd graphs before it runs them: each node is looked at once."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]


def freeable(losses: Sequence[object], cut: Collection[Edge] = (), argument: str = "losses") -> list[bool]:
    """Whether the graph of each loss may be freed when its own backward pass is done; entries that are no tensors may.

    Losses that share nodes form a cluster (parameters do not count: they hold no activations), and the last of a
    cluster frees what it shares. Graphs end at the edges ``cut``; ``argument`` is what the user calls ``losses``.

    Raises:
        ValueError: a graph holds reentrant activation checkpointing, which cannot be asked for gradients.
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

    It hides the parameters it uses: asked for their gradients, autograd would say that no loss reaches them.
    """
    for node in _nodes(loss, ()):
        _refuse_reentrant(f"losses[{i}]", node)


def leaves(loss: Tensor, cut: Collection[Edge] = ()) -> Iterator[Tensor]:
    """The leaf tensors that ``loss`` was computed from and that require grad; nearest to the loss first."""
    return (leaf for node in _nodes(loss, (), cut) if (leaf := _leaf(node)) is not None)


def edge(x: Tensor) -> Edge:
    """Where ``x`` hangs in its graph: a node of several outputs is several edges."""
    found = get_gradient_edge(x)
    return found.node, found.output_nr


def meets(x: Tensor, edges: Collection[Edge]) -> bool:
    """Whether ``x`` was computed from what hangs at one of ``edges``."""
    return any((n, k) in edges for node in _nodes(x, ()) for n, k in node.next_functions)


def _nodes(loss: Tensor, known: Collection[Node], cut: Collection[Edge] = ()) -> Iterator[Node]:
    """The nodes below ``loss``, depth first, each once; nothing below a known one that is no leaf, nor at ``cut``."""
    root, k = edge(loss)
    stack, seen = ([] if (root, k) in cut else [root]), {root}
    while stack:
        node = stack.pop()
        follow = node not in known
        yield node
        if follow:
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
