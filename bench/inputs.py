"""What the contestants of a case work on. Each part is made when first asked for."""

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


def _kept(key: object, make: Callable[[], Any]) -> Any:
    """What ``make`` made for this key, if it was the last: cases on the same gradients follow each other."""
    if key not in _last:
        _last.clear()  # before the next are made, for there may be no room for both
        torch.cuda.empty_cache()  # nor in blocks of another size
        _last[key] = make()
    return _last[key]


class Inputs:
    """The inputs of a case: independent normal gradients, of which about half of the pairs conflict."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.dtype = getattr(torch, case.dtype)

    @property
    def source(self) -> list[Tensor]:
        """What a copy copies."""
        if self.case.P == 0:
            return [self.M]
        return [self.J] if self.case.shapes == "matrix" else [g for row in self.grads for g in row]

    @cached_property
    def target(self) -> list[Tensor]:
        """Where a copy puts it, which makes up for what others have written there."""
        return [tensor.clone() for tensor in self.source]

    @cached_property
    def J(self) -> Tensor:
        """(T, P)."""
        case = self.case
        key = (case.T, case.P, case.dtype, self.device)
        return _kept(key, lambda: self._normal((case.T, case.P)))

    @cached_property
    def rows(self) -> list[Tensor]:
        """The T rows of J."""
        return list(self.J)

    @cached_property
    def w(self) -> Tensor:
        """(T,)."""
        return self._normal((self.case.T,))

    @cached_property
    def weights(self) -> Tensor:
        """(1, T) float32, of a step: a gradient alone is its own combination."""
        return self.w.float()[None] if self.case.T > 1 else torch.ones(1, 1, device=self.device)

    @cached_property
    def W(self) -> Tensor:
        """(T, T)."""
        return self._normal((self.case.T, self.case.T))

    @cached_property
    def shapes(self) -> list[Shape]:
        """Of the tensors left in place."""
        return BERT_BASE if self.case.shapes == "BERT-base" else pieces(self.case.P)

    @cached_property
    def numels(self) -> list[int]:
        """How many numbers each has."""
        return [numbers([shape]) for shape in self.shapes]

    @cached_property
    def params(self) -> list[Tensor]:
        """Leaf tensors, for their shapes alone."""
        return [torch.empty(s, dtype=self.dtype, device=self.device, requires_grad=True) for s in self.shapes]

    @cached_property
    def stepped(self) -> list[Tensor]:
        """Leaf tensors, which a step moves."""
        return [self._normal(shape).requires_grad_() for shape in self.shapes]

    @cached_property
    def grads(self) -> list[list[Tensor]]:
        """``grads[t][k]``, of task t and parameter k."""
        case = self.case
        key = (case.T, case.P, case.dtype, case.shapes, self.device)
        return _kept(key, lambda: [[self._normal(shape) for shape in self.shapes] for _ in range(case.T)])

    @cached_property
    def groups(self) -> list[list[int]]:
        """Which parameters have weights together."""
        each = range(len(self.shapes))
        return [[k] for k in each] if self.case.groups == "parameter" else [list(each)]

    @cached_property
    def segments(self) -> list[int]:
        """The group of each parameter."""
        return [s for s, members in enumerate(self.groups) for _ in members]

    @cached_property
    def suppression(self) -> gk.Suppression | None:
        """None for none."""
        case = self.case
        return gk.Suppression(case.p, case.block, case.scope, seed=0) if case.p else None

    @cached_property
    def index(self) -> Tensor:
        """(d,) int64, ascending positions, evenly apart."""
        d = entries(self.case)
        return torch.arange(d, device=self.device) * self.case.P // d

    @cached_property
    def values(self) -> Tensor:
        """(d,) float32, what to put there."""
        return torch.randn(entries(self.case), device=self.device)

    @cached_property
    def M(self) -> Tensor:
        """(S, T, T) float32, Gramians of a few numbers."""
        X = torch.randn(self.case.S, self.case.T, 64, device=self.device)
        return X @ X.mT

    @cached_property
    def X(self) -> Tensor:
        """(S, T, d), some entries of the gradients."""
        return torch.randn(self.case.S, self.case.T, ENTRIES, device=self.device)

    @cached_property
    def keys(self) -> Tensor:
        """(S, T, T), random orders as the operators take them."""
        return torch.rand(self.M.shape, device=self.device)

    def _normal(self, shape: Shape) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)
