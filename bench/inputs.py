"""The inputs of a case's contestants. Each part is made at first use."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import gradkern as gk
from bench.cases import Case
from bench.floors import ENTRIES, entries
from bench.shapes import BERT_BASE, Shape, numbers, pieces

_last: dict[object, Any] = {}


def _cached(key: object, make: Callable[[], Any]) -> Any:
    """Return ``make()``, cached for the last key only: cases on the same gradients are adjacent."""
    if key not in _last:
        _last.clear()  # before the next value is made: memory may not hold both
        torch.cuda.empty_cache()  # cached blocks of another size would not be reused
        _last[key] = make()
    return _last[key]


class Inputs:
    """The inputs of a case: independent normal gradients. About half of the pairs conflict."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.dtype = getattr(torch, case.dtype)

    @property
    def source(self) -> list[Tensor]:
        """Tensors that the copy reads."""
        if self.case.P == 0:
            return [self.M]
        return [self.J] if self.case.shapes == "matrix" else [g for row in self.grads for g in row]

    @cached_property
    def target(self) -> list[Tensor]:
        """Tensors that the copy writes. It also restores them after other contestants wrote to them."""
        return [tensor.clone() for tensor in self.source]

    @cached_property
    def J(self) -> Tensor:
        """The task gradients, (T, P)."""
        case = self.case
        key = (case.T, case.P, case.dtype, self.device)
        return _cached(key, lambda: self._normal((case.T, case.P)))

    @cached_property
    def rows(self) -> list[Tensor]:
        """The T rows of J."""
        return list(self.J)

    @cached_property
    def w(self) -> Tensor:
        """Random weights, (T,)."""
        return self._normal((self.case.T,))

    @cached_property
    def weights(self) -> Tensor:
        """Weights of a step, (1, T) float32; a single gradient has weight 1."""
        return self.w.float()[None] if self.case.T > 1 else torch.ones(1, 1, device=self.device)

    @cached_property
    def W(self) -> Tensor:
        """Random coefficients, (T, T)."""
        return self._normal((self.case.T, self.case.T))

    @cached_property
    def shapes(self) -> list[Shape]:
        """Shapes of the tensors left in place."""
        return BERT_BASE if self.case.shapes == "BERT-base" else pieces(self.case.P)

    @cached_property
    def numels(self) -> list[int]:
        """Number of elements of each tensor."""
        return [numbers([shape]) for shape in self.shapes]

    @cached_property
    def params(self) -> list[Tensor]:
        """Leaf tensors, used only for their shapes."""
        return [torch.empty(s, dtype=self.dtype, device=self.device, requires_grad=True) for s in self.shapes]

    @cached_property
    def stepped(self) -> list[Tensor]:
        """Leaf tensors that a step updates."""
        return [self._normal(shape).requires_grad_() for shape in self.shapes]

    @cached_property
    def grads(self) -> list[list[Tensor]]:
        """Gradients ``grads[t][k]`` of task t and parameter k."""
        case = self.case
        key = (case.T, case.P, case.dtype, case.shapes, self.device)
        return _cached(key, lambda: [[self._normal(shape) for shape in self.shapes] for _ in range(case.T)])

    @cached_property
    def groups(self) -> list[list[int]]:
        """Parameters of each group; a group has its own weights."""
        each = range(len(self.shapes))
        return [[k] for k in each] if self.case.groups == "parameter" else [list(each)]

    @cached_property
    def segments(self) -> list[int]:
        """Group of each parameter."""
        return [s for s, members in enumerate(self.groups) for _ in members]

    @cached_property
    def suppression(self) -> gk.Suppression | None:
        """The case's suppression, or None."""
        case = self.case
        return gk.Suppression(case.p, case.block, case.scope, seed=0) if case.p else None

    @cached_property
    def index(self) -> Tensor:
        """Ascending, evenly spaced positions, (d,) int64."""
        d = entries(self.case)
        return torch.arange(d, device=self.device) * self.case.P // d

    @cached_property
    def values(self) -> Tensor:
        """Values to write at those positions, (d,) float32."""
        return torch.randn(entries(self.case), device=self.device)

    @cached_property
    def M(self) -> Tensor:
        """Gramians of rows of 64 numbers, (S, T, T) float32."""
        X = torch.randn(self.case.S, self.case.T, 64, device=self.device)
        return X @ X.mT

    @cached_property
    def X(self) -> Tensor:
        """Sampled entries of the gradients, (S, T, d)."""
        return torch.randn(self.case.S, self.case.T, ENTRIES, device=self.device)

    @cached_property
    def keys(self) -> Tensor:
        """Random keys that determine the operators' orders, (S, T, T)."""
        return torch.rand(self.M.shape, device=self.device)

    def _normal(self, shape: Shape) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)
