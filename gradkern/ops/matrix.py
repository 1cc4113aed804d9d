"""Gramian, combination and projection of a matrix of task gradients, with checks of the arguments."""

import torch
from torch import Tensor

from gradkern.arguments import tensor
from gradkern.ops import autograd, operators
from gradkern.ops.dtypes import DTYPES, arithmetic_dtype
from gradkern.ops.offsets import check_offsets
from gradkern.ops.out import check_out

_combine_out = operators.combine_out.overload


def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute the Gramian M = J Jᵀ: every dot product of two task gradients.

    Args:
        J: (T, P), one row per task; float32, float64, bfloat16 or float16. It is read in place if its columns are
            neighbours in memory, whatever lies between its rows, and otherwise copied first.
        offsets: None, or (S + 1,) int64 on the CPU, ascending from 0 to P: segment s is the columns
            ``offsets[s]:offsets[s + 1]``, and has a Gramian of its own.

    Returns:
        (T, T), or (S, T, T) with ``offsets``; float64 for float64 input, otherwise float32; arithmetic has the same
        dtype. Differentiable.

        On one CPU equal matrices give equal bits, for any address, any row stride and any number of threads. Other
        processors may give other bits. The error of an entry is at most
        (w + d + 1) u sum_e |J_ie J_je|: w ≤ 2048 columns are summed up at a time, d = ceil(log2(P / w)), and u is 2^-24
        (float64: 2^-53). About √w u is usual, because roundings cancel. Overflow and underflow come on top. See
        ``gradkern/ops/pytorch/chunks.py``.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """
    return autograd.gramian(readable(J, offsets), offsets)


def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Compute the linear combination wᵀ J of the task gradients. A row whose weight is exactly 0 is not read.

    Args:
        J: as for :func:`gramian`.
        w: (T,), or (S, T) with ``offsets``; floating.
        offsets: as for :func:`gramian`.
        out: memory for the result, (P,), contiguous, of J's dtype and on its device. It must not overlap J or w; the
            gaps between J's rows are fine. None for new memory. The operating system has to provide that, which for
            three rows of 10⁷ numbers takes twice as long as the combination.

    Returns:
        (P,) in J's dtype, computed in float32 (float64 for float64 input); ``out`` itself if that is given, with the
        same bits. Differentiable in J and w. Each element is summed up separately, row by row. Its error is at most
        T u sum_t |w_t J_te| with u = 2^-24 (float64: 2^-53), plus half a unit in the last place of J's dtype. On one
        CPU equal matrices and weights give equal bits.

    Raises:
        TypeError, ValueError: an argument is not as described above; or ``out`` is given, but requires grad, or
            autograd records the combination, or ``torch.func`` transforms it. Nothing has been written then.
    """
    X = readable(J, offsets)
    _check_weights("w", w, J, offsets, (J.shape[0],))
    w = w.to(arithmetic_dtype(J.dtype))
    if out is None:
        return autograd.combine(X, w, offsets)
    check_out(out, J, w)
    _combine_out(X, w, offsets, out)
    return out


def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute the matrix product W J. If W is a method's coefficients, the result is the modified task gradients.

    Args:
        J: as for :func:`gramian`.
        W: (R, T), or (S, R, T) with ``offsets``; floating. R is T for modified gradients, but may be any number from 1.
        offsets: as for :func:`gramian`.

    Returns:
        (R, P) in J's dtype, computed in float32 (float64 for float64 input). Differentiable in J and W. On the CPU its
        row r has the bits of ``combine(J, W[r])``.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """
    X = readable(J, offsets)
    _check_weights("W", W, J, offsets, (W.shape[-2] or 1 if isinstance(W, Tensor) and W.ndim > 1 else 1, J.shape[0]))
    return autograd.project(X, W.to(arithmetic_dtype(J.dtype)), offsets)


def readable(J: Tensor, offsets: Tensor | None) -> Tensor:
    """Return ``J`` with columns of unit stride: itself, or a copy that autograd records.

    Raises:
        TypeError, ValueError: ``J`` or ``offsets`` is not as :func:`gramian` requires.
    """
    tensor("J", J)
    if J.dtype not in DTYPES:
        remedy = "torch.view_as_real(J).flatten(1)" if J.is_complex() else "J.float()"
        raise TypeError(f"J must be float32, float64, bfloat16 or float16, got {J.dtype}: pass {remedy}")
    if J.ndim != 2 or J.shape[0] == 0:
        raise ValueError(f"J must have shape (T, P) with T >= 1, got {tuple(J.shape)}")
    if offsets is not None:
        check_offsets(offsets)
    return J if J.shape[1] <= 1 or J.stride(1) == 1 else J.contiguous()


def _check_weights(name: str, w: Tensor, J: Tensor, offsets: Tensor | None, shape: tuple[int, ...]) -> None:
    tensor(name, w)
    if not w.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {w.dtype}: pass {name}.float()")
    if w.device != J.device:
        raise ValueError(f"{name} must be on J's device, {J.device}; got {w.device}")
    if offsets is not None:
        shape = (offsets.shape[0] - 1, *shape)
    if w.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {shape} for J of shape {tuple(J.shape)}, got {tuple(w.shape)}")
