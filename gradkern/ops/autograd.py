"""Derivatives of the operators. Each derivative is one of the same operators.

    M = J Jᵀ     dJ = (G + Gᵀ) J
    g = wᵀ J     dJ = w gᵀ           dw = J g
    Y = W J      dJ = Wᵀ G           dW = G Jᵀ
    K = A Bᵀ     dA = G B            dB = Gᵀ A

Autograd functions wrap the operators, which record nothing themselves. K, the products of two matrices' rows, exists
for the derivatives only.
"""

from typing import Any

import torch
from torch import Tensor

from gradkern.ops import operators

_gramian_op = operators.gramian.overload
_combine_op = operators.combine.overload
_project_op = operators.project.overload
_cross_op = operators.cross.overload


class _Operator(torch.autograd.Function):
    """Saves an operator's arguments, in the form that lets ``torch.func`` differentiate in reverse mode too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class _Gramian(_Operator):
    @staticmethod
    def forward(J: Tensor, offsets: Tensor | None) -> Tensor:
        return _gramian_op(J, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        J, offsets = ctx.saved_tensors
        return project(J, G + G.mT, offsets), None


class _Combine(_Operator):
    @staticmethod
    def forward(J: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
        return _combine_op(J, w, offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        J, w, offsets = ctx.saved_tensors
        row = g.contiguous().unsqueeze(0)
        dJ = project(row, w.unsqueeze(-1), offsets) if ctx.needs_input_grad[0] else None
        dw = _cross(J, row, offsets).squeeze(-1) if ctx.needs_input_grad[1] else None
        return dJ, dw, None


class _Project(_Operator):
    @staticmethod
    def forward(J: Tensor, W: Tensor, offsets: Tensor | None) -> Tensor:
        return _project_op(J, W, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        J, W, offsets = ctx.saved_tensors
        G = G.contiguous()
        dJ = project(G, W.mT, offsets) if ctx.needs_input_grad[0] else None
        dW = _cross(G, J, offsets) if ctx.needs_input_grad[1] else None
        return dJ, dW, None


class _Cross(_Operator):
    @staticmethod
    def forward(A: Tensor, B: Tensor, offsets: Tensor | None) -> Tensor:
        return _cross_op(A, B, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        A, B, offsets = ctx.saved_tensors
        dA = project(B, G, offsets) if ctx.needs_input_grad[0] else None
        dB = project(A, G.mT, offsets) if ctx.needs_input_grad[1] else None
        return dA, dB, None


def gramian(J: Tensor, offsets: Tensor | None) -> Tensor:
    """Compute M = J Jᵀ, differentiable."""
    return _Gramian.apply(J, offsets) if recording(J) else _gramian_op(J, offsets)


def combine(J: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """Compute g = wᵀ J, differentiable."""
    return _Combine.apply(J, w, offsets) if recording(J) or recording(w) else _combine_op(J, w, offsets)


def project(J: Tensor, W: Tensor, offsets: Tensor | None) -> Tensor:
    """Compute Y = W J, differentiable."""
    return _Project.apply(J, W, offsets) if recording(J) or recording(W) else _project_op(J, W, offsets)


def _cross(A: Tensor, B: Tensor, offsets: Tensor | None) -> Tensor:
    return _Cross.apply(A, B, offsets) if recording(A) or recording(B) else _cross_op(A, B, offsets)


def recording(tensor: Tensor) -> bool:
    """Return whether autograd may differentiate with respect to ``tensor``."""
    # Under a transform of torch.func a tensor's own flag is meaningless.
    wanted = tensor.requires_grad or torch._C._are_functorch_transforms_active()
    return wanted and torch.is_grad_enabled()
