"""Checks of ``out``, the memory that a caller gives for the result of a combination."""

from operator import mul

import torch
from torch import Tensor

from gradkern.arguments import tensor
from gradkern.ops.autograd import recording


def check_out(out: Tensor | None, J: Tensor, *weights: Tensor) -> None:
    """Raise unless ``out`` is None, or can take the combination of J's rows, which needs no derivative.

    Args:
        out: the memory, or None for new memory.
        J: a matrix (T, P), already checked.
        weights: the weights, already checked, if they are the caller's.

    Raises:
        TypeError: ``out`` is not a dense tensor of J's dtype.
        ValueError: it is on another device, of another shape than (P,) or of another stride than 1, requires grad, is
            an inference tensor outside of inference mode, or shares memory with J or the weights; or autograd records
            the combination, or ``torch.func`` transforms it.
    """
    if out is None:
        return
    tensor("out", out)
    if out.dtype != J.dtype:
        raise TypeError(f"out must be {J.dtype} as J is, got {out.dtype}")
    if out.device != J.device:
        raise ValueError(f"out must be on J's device, {J.device}; got {out.device}")
    if out.shape != J.shape[1:]:
        raise ValueError(f"out must have shape {(J.shape[1],)} for J of shape {tuple(J.shape)}, got {tuple(out.shape)}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got stride {out.stride(0)}")
    if out.requires_grad:
        raise ValueError("out must not require grad, got requires_grad=True")
    if any(map(recording, (J, *weights))) or torch._C._are_functorch_transforms_active():
        where = "where autograd records the combination or torch.func transforms it"
        raise ValueError(f"out must be None {where}, got a tensor of shape {tuple(out.shape)}")
    if torch.compiler.is_compiling():  # which traces none of what follows; the operators check the memory as well
        return
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out must not be an inference tensor outside of inference mode, got one")
    if all(map(_has_address, (out, J, *weights))):
        check_apart(out, J, *weights)


def check_apart(out: Tensor, *others: Tensor) -> None:
    """Raise unless ``out`` of one dimension, contiguous, shares no memory with the other tensors.

    It may lie between the rows of a matrix.

    Raises:
        ValueError: it shares memory with one of them.
    """
    start, end = _span(out)
    for other in others:
        first, last = _span(other)
        if start < last and first < end and (other.ndim < 2 or any(_meet(out, row) for row in other)):
            spans = f"{start} to {end}, which overlap {first} to {last}"
            raise ValueError(f"out must share no memory with J and its weights, got the addresses {spans}")


def _has_address(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _meet(a: Tensor, b: Tensor) -> bool:
    (start, end), (first, last) = _span(a), _span(b)
    return start < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's start and of its end; both are 0 for a tensor without elements."""
    start, strides = tensor.data_ptr(), tensor.stride()
    steps = sum(map(mul, tensor.shape, strides)) - sum(strides)
    return start, start and start + (steps + 1) * tensor.element_size()
