"""The operators, each declared once. Back ends register into these; autograd wraps them from outside.

Every operator comes for a matrix ``J`` (T, P) with unit column stride, and as the overload ``tensors`` for the
zero-copy form: ``grads`` holds T x n tensors, row-major, ``grads[t * n + k]`` the gradient of task t for parameter k
or None where the task does not reach it, which counts as zero. All present tensors of one k are dense with equal
strides, so that they are read as flat memory, and tensor k belongs to segment ``segments[k]``.

``offsets`` is an int64 tensor on the CPU, (S + 1,): segment s is the columns ``offsets[s]:offsets[s + 1]``.
Arithmetic is float64 for float64 input and float32 for all others; Gramians and weights are of that dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

torch.library.define("gradkern::gramian", "(Tensor J, Tensor? offsets=None) -> Tensor")
torch.library.define("gradkern::combine", "(Tensor J, Tensor w, Tensor? offsets=None) -> Tensor")
torch.library.define("gradkern::project", "(Tensor J, Tensor W, Tensor? offsets=None) -> Tensor")

torch.library.define("gradkern::cross", "(Tensor A, Tensor B, Tensor? offsets=None) -> Tensor")

torch.library.define("gradkern::gramian.tensors", "(Tensor?[] grads, int[] segments, int n_segments) -> Tensor")
torch.library.define("gradkern::combine.tensors", "(Tensor?[] grads, Tensor w, int[] segments, Tensor(a!)[] out) -> ()")
torch.library.define("gradkern::project.tensors", "(Tensor?[] grads, Tensor W, int[] segments, Tensor(a!)[] out) -> ()")

torch.library.define("gradkern::pcgrad", "(Tensor M, Tensor keys) -> Tensor")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What a gradient may be stored in."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sample(grads: Sequence[Tensor | None]) -> Tensor:
    """Any gradient: all of them have its dtype and device."""
    for g in grads:
        if g is not None:
            return g
    raise ValueError("grads holds no tensor: nothing tells their dtype and device")


@torch.library.register_fake("gradkern::gramian")
def _(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    segments = () if offsets is None else (offsets.shape[0] - 1,)
    return J.new_empty((*segments, J.shape[0], J.shape[0]), dtype=arithmetic_dtype(J.dtype))


@torch.library.register_fake("gradkern::combine")
def _(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    return J.new_empty(J.shape[1])


@torch.library.register_fake("gradkern::project")
def _(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    return J.new_empty((W.shape[-2], J.shape[1]))


@torch.library.register_fake("gradkern::cross")
def _(A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    segments = () if offsets is None else (offsets.shape[0] - 1,)
    return A.new_empty((*segments, A.shape[0], B.shape[0]), dtype=arithmetic_dtype(A.dtype))


@torch.library.register_fake("gradkern::gramian.tensors")
def _(grads: list[Tensor | None], segments: list[int], n_segments: int) -> Tensor:
    T = len(grads) // len(segments)
    like = sample(grads)
    return like.new_empty((n_segments, T, T), dtype=arithmetic_dtype(like.dtype))


@torch.library.register_fake("gradkern::combine.tensors")
def _(grads: list[Tensor | None], w: Tensor, segments: list[int], out: list[Tensor]) -> None:
    return None


@torch.library.register_fake("gradkern::project.tensors")
def _(grads: list[Tensor | None], W: Tensor, segments: list[int], out: list[Tensor]) -> None:
    return None


@torch.library.register_fake("gradkern::pcgrad")
def _(M: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(M, memory_format=torch.contiguous_format)
