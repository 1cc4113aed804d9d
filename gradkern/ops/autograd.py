"""The operators' derivatives, around them and not inside: each is one of the same operators again.

    M = J Jᵀ     dJ = (G + Gᵀ) J
    g = wᵀ J     dJ = w gᵀ           dw = J g
    Y = W J      dJ = Wᵀ G           dW = G Jᵀ
    K = A Bᵀ     dA = G B            dB = Gᵀ A

K, the products of two matrices' rows, is there for these derivatives only.
"""

from typing import Any

import torch
from torch import Tensor

from gradkern.ops import backends  # noqa: F401  (registers the operators)

ops = torch.ops.gradkern


class _Gramian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, J: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(J, offsets)
        return ops.gramian(J, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        J, offsets = ctx.saved_tensors
        return project(J, G + G.mT, offsets), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, J: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(J, w, offsets)
        return ops.combine(J, w, offsets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        J, w, offsets = ctx.saved_tensors
        row = g.contiguous().unsqueeze(0)
        dJ = project(row, w.unsqueeze(-1), offsets) if ctx.needs_input_grad[0] else None
        dw = _cross(J, row, offsets).squeeze(-1) if ctx.needs_input_grad[1] else None
        return dJ, dw, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, J: Tensor, W: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(J, W, offsets)
        return ops.project(J, W, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        J, W, offsets = ctx.saved_tensors
        G = G.contiguous()
        dJ = project(G, W.mT, offsets) if ctx.needs_input_grad[0] else None
        dW = _cross(G, J, offsets) if ctx.needs_input_grad[1] else None
        return dJ, dW, None


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(A, B, offsets)
        return ops.cross(A, B, offsets)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        A, B, offsets = ctx.saved_tensors
        dA = project(B, G, offsets) if ctx.needs_input_grad[0] else None
        dB = project(A, G.mT, offsets) if ctx.needs_input_grad[1] else None
        return dA, dB, None


def gramian(J: Tensor, offsets: Tensor | None) -> Tensor:
    """M = J Jᵀ."""
    return _Gramian.apply(J, offsets) if _recording(J) else ops.gramian(J, offsets)


def combine(J: Tensor, w: Tensor, offsets: Tensor | None) -> Tensor:
    """g = wᵀ J."""
    return _Combine.apply(J, w, offsets) if _recording(J, w) else ops.combine(J, w, offsets)


def project(J: Tensor, W: Tensor, offsets: Tensor | None) -> Tensor:
    """Y = W J."""
    return _Project.apply(J, W, offsets) if _recording(J, W) else ops.project(J, W, offsets)


def _cross(A: Tensor, B: Tensor, offsets: Tensor | None) -> Tensor:
    return _Cross.apply(A, B, offsets) if _recording(A, B) else ops.cross(A, B, offsets)


def _recording(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
