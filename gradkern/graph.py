"""What a step has to know of the autograd graphs before it runs them: each node is looked at once."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def freeable(losses: Sequence[object]) -> list[bool]:
    """Whether the graph of each loss may be freed when its own backward pass is done; entries that are no tensors may.

    Losses that share nodes form a cluster (parameters do not count: they hold no activations), and the last of a
    cluster frees what it shares.

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
        for node in _nodes(loss, owner):
            if _leaf(node) is not None:
                continue
            if node in owner:
                cluster[latest(owner[node])] = i
            else:
                _refuse_reentrant(i, node)
            owner[node] = i
    return [latest(i) == i for i in range(len(losses))]


def refuse_reentrant(i: int, loss: Tensor) -> None:
    """Raise ValueError if the graph of ``losses[i]`` holds reentrant activation checkpointing.

    It hides the parameters it uses: asked for their gradients, autograd would say that no loss reaches them.
    """
    for node in _nodes(loss, ()):
        _refuse_reentrant(i, node)


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that ``loss`` was computed from and that require grad; nearest to the loss first."""
    return (leaf for node in _nodes(loss, ()) if (leaf := _leaf(node)) is not None)


def _nodes(loss: Tensor, known: Collection[Node]) -> Iterator[Node]:
    """The nodes below ``loss``, depth first, each once; nothing below a known one that is no leaf."""
    root = get_gradient_edge(loss).node
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        follow = node not in known
        yield node
        if follow:
            below = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(below)
            stack.extend(below)


def _refuse_reentrant(i: int, node: Node) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            f"losses[{i}] runs through reentrant activation checkpointing, which cannot give the gradients of one "
            "task: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def _leaf(node: Any) -> Tensor | None:
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
