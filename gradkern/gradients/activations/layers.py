"""The layers whose weights are used as matrices: what went in, and the gradient by what comes back out.

A task's gradient of such a weight is Dᵀ A, (q, p). A (N, p) is what went into the layer, the same for all tasks; N
counts the tokens of the batch, or its examples or pixels. D (N, q) is what comes back out of the layer. No module is
hooked: the nodes of the autograd graph keep A, and a backward pass that ends at a node gives D. So functional code and
tied weights count too.
"""

from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradkern.gradients.activations.trace import Trace
from gradkern.gradients.embeddings import NO_PADDING, looks_up


class Layer(Protocol):
    """A node that uses a parameter as a matrix.

    Attributes:
        node: the node.
        kind: layers of one kind can be taken as one, with their tokens one after another.
        n: N.
        p, q: as above.
    """

    node: Any
    kind: tuple[object, ...]
    n: int
    p: int
    q: int

    def read(self) -> Tensor:
        """Return what went in, as the node keeps it. A backward pass that frees the graph frees it."""

    def sketched(self, kept: Tensor, S: Tensor) -> Tensor:
        """Return A S (N, k) for S (p, k), of what :meth:`read` has returned."""

    def tokens(self, D: Tensor) -> Tensor:
        """Return (T, N, q) of what came back for T tasks, (T, *output)."""

    def grad(self, kept: Tensor, d: Tensor) -> Tensor:
        """Return the parameter's gradient by what came back, (*output), of one task or a sum of tasks."""


class Linear:
    """A product of matrices, A Wᵀ, or A W unless ``out_first``."""

    def __init__(self, node: Any, p: Tensor, out_first: bool, saved: str) -> None:
        self.node, self._saved, self._out_first = node, saved, out_first
        self.kind: tuple[object, ...] = (Linear, out_first)
        self.n, self.q = node._input_metadata[0].shape
        self.p = p.numel() // self.q

    def read(self) -> Tensor:
        """See :meth:`Layer.read`."""
        kept: Tensor = getattr(self.node, self._saved)
        return kept.detach()

    def inputs(self, kept: Tensor) -> Tensor:
        """Return A (N, p)."""
        return kept

    def sketched(self, kept: Tensor, S: Tensor) -> Tensor:
        """See :meth:`Layer.sketched`."""
        return kept @ S

    def tokens(self, D: Tensor) -> Tensor:
        """See :meth:`Layer.tokens`."""
        return D

    def grad(self, kept: Tensor, d: Tensor) -> Tensor:
        """See :meth:`Layer.grad`."""
        return d.T @ kept if self._out_first else kept.T @ d


class Convolution:
    """A convolution in one or two dimensions, not transposed; A has the patches under its kernel."""

    def __init__(self, node: Any, p: Tensor) -> None:
        self.node, self._weight = node, p.detach()
        shape = node._input_metadata[0].shape  # (B, q, *positions)
        self.kind: tuple[object, ...] = (Convolution,) if node._saved_groups == 1 else (Convolution, node)
        self.is_grouped = node._saved_groups != 1
        self.q, self.n = shape[1], prod(shape) // shape[1]
        self.p = p.numel() // self.q

    def read(self) -> Tensor:
        """See :meth:`Layer.read`."""
        kept: Tensor = self.node._saved_input
        return kept.detach()

    def inputs(self, kept: Tensor) -> Tensor:
        """Return A (N, p)."""
        kernel, (stride, padding, dilation) = tuple(self._weight.shape[2:]), self._geometry
        if kept.ndim == 3:
            kept, kernel = kept.unsqueeze(2), (1, *kernel)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        return F.unfold(kept, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)

    def sketched(self, kept: Tensor, S: Tensor) -> Tensor:
        """See :meth:`Layer.sketched`: it is a convolution with k random filters."""
        filters = S.T.reshape(-1, *self._weight.shape[1:])
        out = torch.convolution(kept, filters, None, *self._geometry, False, self.node._saved_output_padding, 1)
        return out.movedim(1, -1).flatten(0, -2)

    def tokens(self, D: Tensor) -> Tensor:
        """See :meth:`Layer.tokens`."""
        return D.movedim(2, -1).flatten(1, -2)

    def grad(self, kept: Tensor, d: Tensor) -> Tensor:
        """See :meth:`Layer.grad`."""
        node = self.node
        how = (*self._geometry, False, node._saved_output_padding, node._saved_groups, [False, True, False])
        like = torch.empty_like(self._weight, dtype=d.dtype)  # only its shape counts, and the weight may be freed
        grads = torch.ops.aten.convolution_backward(d, kept, like, None, *how)
        found: Tensor = grads[1]
        return found

    @property
    def _geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        node = self.node
        return tuple(node._saved_stride), tuple(node._saved_padding), tuple(node._saved_dilation)


class Embedding:
    """A look-up of rows; A has a one for each token, in the column of its row, and zeros for padding."""

    def __init__(self, node: Any, p: Tensor) -> None:
        self.node = node
        padding = node._saved_padding_idx
        self.padding = -1 if padding >= NO_PADDING else padding
        self.kind: tuple[object, ...] = (Embedding,)
        self.p, self.q = p.shape
        self.n = prod(node._input_metadata[0].shape) // self.q

    def read(self) -> Tensor:
        """See :meth:`Layer.read`: the numbers of the rows."""
        kept: Tensor = self.node._saved_indices
        return kept

    def sketched(self, kept: Tensor, S: Tensor) -> Tensor:
        """See :meth:`Layer.sketched`."""
        ids = kept.flatten()
        return S[ids].masked_fill((ids == self.padding).unsqueeze(-1), 0.0)

    def tokens(self, D: Tensor) -> Tensor:
        """See :meth:`Layer.tokens`."""
        return D.flatten(1, -2)

    def grad(self, kept: Tensor, d: Tensor) -> Tensor:
        """See :meth:`Layer.grad`."""
        return torch.ops.aten.embedding_dense_backward(d, kept, self.p, self.padding, False)


def layers_of(trace: Trace, p: Tensor) -> list[Layer]:
    """Return the layers that use a parameter; an empty list if it is used in another way too."""
    if p.is_complex() or not p.numel():
        return []
    found: list[Layer] = []
    stack = [(trace.leaves[p], False)]
    while stack:
        below, is_flipped = stack.pop()
        for node, number in trace.users[below]:
            if node.name() in _PASSED_ON and (p.ndim == 2 or node.name() == "ToCopyBackward0"):
                stack.append((node, is_flipped != _flips(node)))
                continue
            layer = _layer(node, number, p, is_flipped)
            if layer is None:
                return []
            found.append(layer)
    return found


_PASSED_ON = ("TBackward0", "TransposeBackward0", "PermuteBackward0", "ToCopyBackward0")
"""The nodes between a weight and the layer: its transpose as t(), mT and T make it, and the copy that autocast makes.

A convolution's weight has no one transpose.
"""


def _flips(node: Any) -> bool:
    """Return whether a node transposes a matrix. Autograd keeps negative dimensions as even and odd numbers too."""
    match node.name():
        case "TBackward0":
            return True
        case "TransposeBackward0":
            return bool((node._saved_dim0 + node._saved_dim1) % 2)
        case "PermuteBackward0":
            return bool(node._saved_dims[0] % 2)
    return False


def _layer(node: Any, number: int, p: Tensor, is_flipped: bool) -> Layer | None:
    if node._input_metadata[0].dtype.is_complex:
        return None
    match node.name(), number:
        case ("AddmmBackward0", 2) if node._saved_alpha == 1:
            return Linear(node, p, is_flipped, "_saved_mat1")
        case ("MmBackward0", 1):
            return Linear(node, p, is_flipped, "_saved_self")
        case ("ConvolutionBackward0", 1) if not is_flipped and _is_plain(node):
            return Convolution(node, p)
        case ("EmbeddingBackward0", 0) if not is_flipped and looks_up(node):
            return Embedding(node, p)
    return None


def _is_plain(node: Any) -> bool:
    return not node._saved_transposed and len(node._saved_stride) < 3
