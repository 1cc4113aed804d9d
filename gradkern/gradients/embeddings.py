"""Gradients of embeddings as the rows that occur in a batch: their numbers, and the gradients of the layer's output.

A task's gradient of an embedding is zeros but for the words of its batch. Autograd makes it whole for each task. Here a
backward pass ends at the layer's output, and the gradient is a sparse tensor of the words' rows.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradkern.gradients import graph
from gradkern.gradients.engine import Target, differentiated, raise_explained
from gradkern.gradients.layouts import PLANS, Row, make_room
from gradkern.ops.dtypes import arithmetic_dtype

LEAST = 1 << 18
"""The number of elements from which on an embedding is looked for. The search takes 2 µs for each node of a graph."""
NO_PADDING = 1 << 63
"""Autograd keeps a negative padding_idx as an unsigned integer, from here on."""


class Compact:
    """Runs backward passes whose gradients of embeddings are the rows that occur.

    Args:
        targets: the parameters of a step.

    Attributes:
        params: the embeddings of which a gradient has been compact.
    """

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self.params: set[Tensor] = set()
        large = [p for p in targets if p.dim() == 2 and p.numel() >= LEAST and p.is_contiguous()]
        self._large = [p for p in large if _takes_rows(p)]
        self._key = hash(tuple(map(id, self._large)))
        if self._key in _in_vain:
            self._large = []

    def differentiate(
        self,
        name: str,
        outputs: tuple[Tensor, ...],
        targets: Sequence[Target],
        retain_graph: bool,
        grads: tuple[Tensor, ...],
    ) -> Row:
        """Return the gradients of ``targets``, those of embeddings as sparse tensors; see :func:`differentiated`."""
        large = [p for p in self._large if _takes_rows(p)]  # a callable may have frozen one, or added a hook
        layers = _layers(outputs, large) if large else {}
        if not layers:
            return differentiated(name, outputs, targets, retain_graph, grads)
        nodes = [node for of_param in layers.values() for node in of_param]
        ids = _ids(name, outputs, nodes)
        others = [p for p in targets if p not in layers]
        ends: list[Target] = [*others, *(GradientEdge(node, 0) for node in nodes)]
        found = differentiated(name, outputs, ends, retain_graph, grads)
        of_nodes = dict(zip(nodes, found[len(others) :], strict=True))
        row: dict[Target, Tensor | None] = dict(zip(others, found, strict=False))
        for p, of_param in layers.items():
            parts = [(node, ids[node], D) for node in of_param if (D := of_nodes[node]) is not None]
            row[p] = _rows_that_occur(p, parts) if parts else None
        self.params.update(layers)
        return [row[p] for p in targets]

    def note(self) -> None:
        """Let later steps search no graphs if none of this one's has an embedding of these parameters."""
        if self._large and not self.params:
            make_room(_in_vain, 64 * PLANS)
            _in_vain.add(self._key)


_in_vain: set[int] = set()
"""Hashes of the identities of large parameters under whose losses no embedding was found."""


def _takes_rows(p: Tensor) -> bool:
    """Return whether a parameter has a gradient, and no hook that sees it whole."""
    return p.requires_grad and not p._backward_hooks


def _layers(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> dict[Tensor, list[Any]]:
    """Return the nodes that look up rows of a parameter, for each parameter that has no other use.

    A parameter whose layers have more rows than it has itself is left out.
    """
    known, found, other = set(params), dict[Tensor, list[Any]](), set[Tensor]()
    for node, number, p in graph.uses(outputs):
        if p not in known:
            continue
        if number == 0 and looks_up(node):
            found.setdefault(p, []).append(node)
        else:
            other.add(p)
    return {p: nodes for p, nodes in found.items() if p not in other and sum(map(_n_rows, nodes)) < len(p)}


def _ids(name: str, outputs: Sequence[Tensor], nodes: Sequence[Any]) -> dict[Any, Tensor]:
    """Return the numbers of the rows that layers look up; a pass may free them."""
    try:
        return {node: node._saved_indices for node in nodes}
    except RuntimeError as error:
        raise_explained(name, outputs, error)
        raise


def looks_up(node: Any) -> bool:
    """Return whether a node looks up rows of a dense tensor of numbers, and its gradient by the rows is dense."""
    if node.name() != "EmbeddingBackward0" or node._input_metadata[0].is_nested_tensor:
        return False
    return not (node._saved_sparse or node._saved_scale_grad_by_freq)


def numbered(ids: Tensor) -> Tensor:
    """Return a number below N for each of N ids; equal ids have one number. The host waits for no device."""
    ascending, order = ids.sort()
    numbers = torch.empty_like(ids, dtype=torch.int64)
    numbers[order] = (ascending.diff(prepend=ascending[:1]) != 0).cumsum(0)
    return numbers


def added_up(index: Tensor, values: Tensor, n: int) -> Tensor:
    """Return a matrix of ``n`` rows to which ``values`` (N, d) are added at ``index`` (N,); float32 of 16-bit ones."""
    values = values.to(arithmetic_dtype(values.dtype))
    return torch.ops.aten.embedding_dense_backward(values, index, n, -1, False)


def _n_rows(node: Any) -> int:
    """Return the number of rows that a layer looks up, those that repeat too."""
    shape = node._input_metadata[0].shape
    return prod(shape[:-1])


def _rows_that_occur(p: Tensor, parts: Sequence[tuple[Node, Tensor, Tensor]]) -> Tensor:
    """Return the gradient of an embedding: a sparse tensor, not coalesced, zeros at padding.

    Args:
        p: the embedding, (V, d).
        parts: for each layer its node, the numbers of the rows, and their gradients.
    """
    indices, values = [], []
    for node, ids, D in parts:
        padding: int = node._saved_padding_idx  # type: ignore[attr-defined]
        ids, D = ids.flatten(), D.reshape(-1, p.shape[1])
        values.append(D if padding >= NO_PADDING else D.masked_fill((ids == padding).unsqueeze(-1), 0.0))
        indices.append(ids)
    index, value = torch.cat(indices).long().unsqueeze(0), torch.cat(values)
    return torch.sparse_coo_tensor(index, value, p.shape, check_invariants=False)
