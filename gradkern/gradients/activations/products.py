"""The dot products of the tasks' gradients of one parameter, from what went into its layers and what comes back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.gradients.activations.cost import Sizes, machine_of
from gradkern.gradients.activations.layers import Convolution, Embedding, Layer, Linear
from gradkern.gradients.embeddings import added_up, numbered
from gradkern.modifiers.sketch import Sketch
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype


class Passed(NamedTuple):
    """A layer with its input, and with the gradients that came back.

    Attributes:
        layer: the layer.
        kept: what went in, as :meth:`Layer.read` returns it.
        grads: what came back for each of T tasks; None for a task that does not reach the layer.
    """

    layer: Layer
    kept: Tensor
    grads: list[Tensor | None]


@dataclass(frozen=True)
class Weight:
    """A parameter that is used as a matrix, and its layers.

    Attributes:
        param: the parameter.
        place: its number among the step's parameters.
        layers: all its uses, one or more.
    """

    param: Tensor
    place: int
    layers: Sequence[Layer]

    def sizes(self, n_tasks: int) -> Sizes:
        """Return the sizes of its layers as one layer, with their tokens one after another."""
        first = self.layers[0]
        return Sizes(n_tasks, sum(layer.n for layer in self.layers), first.p, first.q)

    @property
    def is_of_one_kind(self) -> bool:
        """Whether its layers can be taken as one."""
        return len({layer.kind for layer in self.layers}) == 1

    @property
    def is_embedding(self) -> bool:
        """Whether all its uses are look-ups of rows."""
        return all(isinstance(layer, Embedding) for layer in self.layers)

    @property
    def has_inputs(self) -> bool:
        """Whether what went in is one matrix A."""
        first = self.layers[0]
        is_plain = isinstance(first, Linear) or (isinstance(first, Convolution) and not first.is_grouped)
        return is_plain and self.is_of_one_kind

    @property
    def is_sketchable(self) -> bool:
        """Whether all its layers can be sketched with the same signs, because they are alike."""
        return self.has_inputs or self.is_embedding

    def is_sketched(self, columns: int) -> bool:
        """Return whether a sketch of so many columns is smaller than what it stands for."""
        sizes = self.sizes(1)
        return self.has_inputs and columns < min(sizes.n, sizes.p)

    def is_cheaper_without_rows(self, n_tasks: int, sketch: Sketch | None) -> bool:
        """Return whether one weight gradient and dot products cost less than T weight gradients, combined."""
        sizes, machine = self.sizes(n_tasks), machine_of(self.param.device)
        if self.is_embedding:
            return sizes.n < sizes.p
        if sketch is not None and self.is_sketched(sketch.columns):
            return True
        return self.has_inputs and machine.inner(sizes, True) < machine.direct(sizes, True)


def products(weight: Weight, passed: Sequence[Passed]) -> Tensor:
    """Return the dot products of the tasks' gradients of a weight, (T, T); float64 if they are, else float32."""
    n_tasks = len(passed[0].grads)
    if weight.is_embedding:
        return _of_rows_that_occur(passed)
    sizes, machine = weight.sizes(n_tasks), machine_of(weight.param.device)
    if weight.has_inputs and machine.inner(sizes, False) < machine.direct(sizes, False):
        return _inner(passed)
    return _products(task_grads(passed))


def sketched_products(weight: Weight, passed: Sequence[Passed], sketch: Sketch) -> Tensor:
    """Return an estimate of :func:`products`, or these where they cost no more."""
    if not weight.is_sketched(sketch.columns):
        return products(weight, passed)
    return _products(sketched_rows(weight, passed, sketch))


def sketched_rows(weight: Weight, passed: Sequence[Passed], sketch: Sketch) -> Tensor:
    """Return the tasks' gradients of a weight times random signs, (T, q, k), float32 or float64."""
    first = passed[0]
    S = sketch.signs(weight.place, first.layer.p, arithmetic_dtype(weight.param.dtype), weight.param.device)
    total: Tensor | None = None
    for layer, kept, grads in passed:
        D = layer.tokens(_stacked(grads)).to(S.dtype)
        read = kept.to(S.dtype) if kept.is_floating_point() else kept
        X = D.transpose(1, 2) @ layer.sketched(read, S)
        total = X if total is None else total + X
    assert total is not None, "a weight has a layer"
    return total


def task_grads(passed: Sequence[Passed]) -> list[Tensor | None]:
    """Return each task's gradient of a weight, None for a task that reaches none of its layers."""
    of_tasks = []
    for t in range(len(passed[0].grads)):
        terms = [one.layer.grad(one.kept, d) for one in passed if (d := one.grads[t]) is not None]
        of_tasks.append(sum(terms[1:], terms[0]) if terms else None)
    return of_tasks


def weighted_grad(passed: Sequence[Passed], w: Tensor) -> Tensor:
    """Return the gradient of a weight by Σ_t w_t D_t, one product for each layer.

    Args:
        passed: what has passed through its layers, each of which a task reaches.
        w: (T,), float32 or float64.
    """
    terms = []
    for layer, kept, grads in passed:
        reached = next(d for d in grads if d is not None)
        d = torch.empty(reached.shape, dtype=reached.dtype, device=reached.device)
        rows = [None if g is None else g.contiguous() for g in grads]
        operators.combine_tensors(TaskGrads(rows, [0], 1), w.unsqueeze(0).to(arithmetic_dtype(d.dtype)), [d])
        terms.append(layer.grad(kept, d))
    return sum(terms[1:], terms[0])


def _of_rows_that_occur(passed: Sequence[Passed]) -> Tensor:
    """Return dot products over the rows of an embedding that the batch looks up; repeated ones are added up first."""
    tokens: list[Tensor] = []
    ids: list[Tensor] = []
    is_padding: list[Tensor] = []
    for layer, kept, grads in passed:
        assert isinstance(layer, Embedding)
        tokens.append(_wide(layer.tokens(_stacked(grads))))
        ids.append(kept.flatten())
        is_padding.append(ids[-1] == layer.padding)
    D = torch.cat(tokens, 1).masked_fill(torch.cat(is_padding).unsqueeze(-1), 0.0)
    n_tasks, n, q = D.shape
    X = added_up(numbered(torch.cat(ids)), D.transpose(0, 1).reshape(n, n_tasks * q), n)
    return _products(X.view(n, n_tasks, q).transpose(0, 1).contiguous())


def _inner(passed: Sequence[Passed]) -> Tensor:
    """Return ⟨D_i, (A Aᵀ) D_j⟩ with the tokens of all layers one after another."""
    inputs: list[Tensor] = []
    tokens: list[Tensor] = []
    for layer, kept, grads in passed:
        assert isinstance(layer, Linear | Convolution)
        inputs.append(_wide(layer.inputs(kept)))
        tokens.append(_wide(layer.tokens(_stacked(grads))))
    A = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
    D = torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0].contiguous()
    M = operators.cross_tensors(TaskGrads(list(D), [0], 1), list((A @ A.T) @ D), None)[0]
    return (M + M.T) / 2  # the products of i with j and of j with i round differently


def _products(rows: Iterable[Tensor | None]) -> Tensor:
    """Return the dot products of T tensors, None for one of zeros."""
    return operators.gramian_tensors(TaskGrads([None if g is None else g.contiguous() for g in rows], [0], 1))[0]


def _stacked(grads: Sequence[Tensor | None]) -> Tensor:
    """Return (T, …), zeros for tasks that do not reach the layer."""
    zeros = torch.zeros_like(next(d for d in grads if d is not None))
    return torch.stack([zeros if d is None else d for d in grads])


def _wide(x: Tensor) -> Tensor:
    """Return numbers of 16 bits in float32: sums of products of them overflow, or lose their difference."""
    return x.to(arithmetic_dtype(x.dtype))
