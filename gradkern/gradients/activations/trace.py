"""The graphs below the losses of a step, as a step through activations walks them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from gradkern.gradients.graph import Edge, edge

Use = tuple[Node, int]
"""A node, and the number of the argument that something is of it."""


class Trace:
    """The nodes below losses that were computed from leaves, and which losses reach each.

    Args:
        losses: the losses of present tasks, by their numbers.

    Attributes:
        roots: the edge that each loss is.
        order: all nodes, each before those that it was computed from, otherwise the latest first.
        users: for each node the nodes that were computed from it, and as which argument; the roots have none.
        tasks: for each node the losses that reach it, as bits.
        leaves: the node that accumulates the gradient of each leaf.
    """

    def __init__(self, losses: Mapping[int, Tensor]) -> None:
        self.roots: dict[int, Edge] = {i: edge(loss) for i, loss in losses.items()}
        self.users: dict[Any, list[Use]] = _users(node for node, _ in self.roots.values())
        self.order = self._ordered()
        self.tasks: dict[Any, int] = defaultdict(int)
        for i, (node, _) in self.roots.items():
            self.tasks[node] |= 1 << i
        for node in self.order:
            for below, _ in node.next_functions:
                if below is not None:
                    self.tasks[below] |= self.tasks[node]
        self.leaves: dict[Tensor, Any] = {node.variable: node for node in self.order if is_leaf(node)}

    def is_shared(self, node: Node) -> bool:
        """Return whether two losses reach a node."""
        return self.tasks[node].bit_count() > 1

    def above(self, targets: Iterable[Node]) -> set[Node]:
        """Return the nodes that were computed from any of ``targets``, and these."""
        found = set(targets)
        stack = list(found)
        while stack:
            for user, _ in self.users[stack.pop()]:
                if user not in found:
                    found.add(user)
                    stack.append(user)
        return found

    def _ordered(self) -> list[Any]:
        """Return the nodes in the order in which a backward pass can run them.

        Autograd numbers nodes as they are made, in each thread anew, so the numbers alone are no such order. They keep
        few gradients waiting.
        """
        waiting = {node: len(users) for node, users in self.users.items()}
        ready: list[tuple[int, int, Any]] = []
        order: list[Any] = []

        def add(node: Any) -> None:
            heappush(ready, (-node._sequence_nr(), len(ready) + len(order), node))

        for node, n in waiting.items():
            if n == 0:
                add(node)
        while ready:
            _, _, node = heappop(ready)
            order.append(node)
            for below, _ in node.next_functions:
                if below is not None:
                    waiting[below] -= 1
                    if waiting[below] == 0:
                        add(below)
        return order


def is_leaf(node: Node) -> bool:
    """Return whether a node accumulates the gradient of a leaf."""
    return type(node).__name__ == "AccumulateGrad"


def _users(roots: Iterable[Any]) -> dict[Any, list[Use]]:
    users: dict[Any, list[Use]] = {}
    stack = []
    for root in roots:
        if root not in users:
            users[root] = []
            stack.append(root)
    while stack:
        node = stack.pop()
        for number, (below, _) in enumerate(node.next_functions):
            if below is not None:
                if below not in users:
                    users[below] = []
                    stack.append(below)
                users[below].append((node, number))
    return users
