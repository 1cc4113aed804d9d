"""The operators, each declared once. Back ends register into these; autograd wraps them from outside.

Every operator comes for a matrix ``J`` (T, P) with unit column stride, and as the overload ``tensors`` for the
zero-copy form: ``grads`` holds T x n tensors, row-major, ``grads[t * n + k]`` the gradient of task t for parameter k
or None where the task does not reach it, which counts as zero. All present tensors of one k are dense with equal
strides, so that they are read as flat memory, and tensor k belongs to segment ``segments[k]``. ``combine`` may be given
one of the gradients that it sums up as their ``out[k]``.

``offsets`` is an int64 tensor on the CPU, (S + 1,): segment s is the columns ``offsets[s]:offsets[s + 1]``.
Arithmetic is float64 for float64 input and float32 for all others; Gramians and weights are of that dtype.

The overloads ``masked`` are of gradient suppression: runs of ``block`` neighbouring entries of a tensor, its units,
count as zero and are not read where word u mod 4 of Philox4x32-10, key ``mask[0]``, counter (u div 4, ``mask[1]``),
is below ``mask[2]``; u is the unit's number, ``units[k]`` that of the first one of tensor k and a multiple of 4. A
tensor with a negative number is not masked. ``mask`` holds seed, step and threshold, int64 on the device, so that none
of them is asked for and a captured CUDA graph moves on. ``combine.masked`` returns how many entries of masked tensors
were kept, int64 of no dimension.

``gather`` and ``scatter`` are of single entries, at the ascending positions ``index`` (d,), int64 on the device, of the
tensors one after another, ``numels[k]`` elements each. ``gather`` gives (T, d) in arithmetic dtype; ``scatter`` writes
``values`` (d,) and leaves all others as they are, also all of a tensor in ``out`` that has no elements.

``pcgrad`` and ``gradvac`` are T x T programs. Task i visits the others in ascending order of ``keys[..., i, :]``,
floating, equal keys by number; ``keys`` is (S, T, T), or (1, T, T) for all alike. ``partner``, one of
``partners.PARTNERS``, says whom PCGrad visits: "all", or the first one, "random". The others take no keys, and follow
from M: the one of largest or smallest cosine, "most_similar" or "most_different", of equals the first, or the
"average" of all, each from the original gradient. ``pcgrad.matrix`` is the whole surgery of J with ``keys`` (1, T, T)
or none: the sum of its modified rows, or their mean.

Their overloads ``tensors`` and ``masked`` are the whole surgery of gradients left in place: Gramians M (S, T, T), the
weights w (S, T) that the method finds for them, and their combination, which goes to ``out``. Returned are M and w,
both in arithmetic dtype, and from ``masked`` how many entries were kept. Only the modified rows of tasks that are
``present`` (T,) bool, all without it, are summed up, with ``mean`` divided by T. A tensor of segment -1 is outside
surgery: it is combined by ``plain`` (T,), or added up without, and is in no Gramian. ``masked`` takes dot products of
the kept entries if ``products``, else of all. No target of ``gradvac`` moves where any dot product of any segment is
not finite. A result may take the place of a gradient of its own tensor, in memory that is no other's.

``adamw`` combines as ``combine.tensors`` does and takes the step of torch.optim.AdamW along the result, which goes to
no memory. ``moments`` has exp_avg of all n tensors, then exp_avg_sq, and with amsgrad max_exp_avg_sq: in arithmetic
dtype, laid out as ``params``. ``steps`` are float32 of no dimension, this step counted. Where ``found_inf``, of no
dimension, is not 0 nothing changes. ``hyperparameters`` are lr, beta1, beta2, weight_decay and eps; lr is multiplied by
``lr_scale``, of no dimension.
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

torch.library.define(
    "gradkern::gramian.masked",
    "(Tensor?[] grads, int[] segments, int n_segments, int[] units, int block, Tensor mask) -> Tensor",
)
torch.library.define(
    "gradkern::combine.masked",
    "(Tensor?[] grads, Tensor w, int[] segments, int[] units, int block, Tensor mask, Tensor(a!)[] out) -> Tensor",
)

torch.library.define("gradkern::gather", "(Tensor?[] grads, int[] numels, Tensor index) -> Tensor")
torch.library.define("gradkern::scatter", "(Tensor values, int[] numels, Tensor index, Tensor(a!)[] out) -> ()")

torch.library.define("gradkern::pcgrad", "(Tensor M, Tensor? keys, str partner) -> Tensor")
torch.library.define("gradkern::pcgrad.matrix", "(Tensor J, Tensor? keys, str partner, bool mean) -> Tensor")
torch.library.define(
    "gradkern::gradvac",
    "(Tensor M, Tensor keys, Tensor(a!) targets, Tensor moving, float beta) -> Tensor",
)

_OF = "Tensor?[] grads, int[] segments, int n_segments"
_PCGRAD = "Tensor? keys, str partner, bool mean, Tensor? present, Tensor? plain"
_GRADVAC = "Tensor keys, Tensor(b!) targets, Tensor moving, float beta, bool mean, Tensor? present, Tensor? plain"
_MASK = "int[] units, int block, Tensor mask, bool products"
for _name, _method in (("pcgrad", _PCGRAD), ("gradvac", _GRADVAC)):
    torch.library.define(f"gradkern::{_name}.tensors", f"({_OF}, {_method}, Tensor(a!)[] out) -> (Tensor, Tensor)")
    torch.library.define(
        f"gradkern::{_name}.masked", f"({_OF}, {_method}, {_MASK}, Tensor(a!)[] out) -> (Tensor, Tensor, Tensor)"
    )

_ADAMW = (
    "Tensor(a!)[] params, Tensor(b!)[] moments, Tensor[] steps, Tensor? found_inf, Tensor? lr_scale, "
    "float[] hyperparameters"
)
torch.library.define("gradkern::adamw", f"(Tensor?[] grads, Tensor w, int[] segments, {_ADAMW}) -> ()")
torch.library.define(
    "gradkern::adamw.masked",
    f"(Tensor?[] grads, Tensor w, int[] segments, int[] units, int block, Tensor mask, {_ADAMW}) -> Tensor",
)

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


def numels(tensors: Sequence[Tensor | None], n: int) -> list[int]:
    """How many elements tensor k has, of n, which every n-th from it on has that is there; 0 if none is."""
    # The first n are mostly there, and to look along all the others of hundreds of tensors takes 70 µs.
    return [
        g.numel() if g is not None else next((t.numel() for t in tensors[k::n] if t is not None), 0)
        for k, g in enumerate(tensors[:n])
    ]


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


@torch.library.register_fake("gradkern::gramian.masked")
def _(
    grads: list[Tensor | None], segments: list[int], n_segments: int, units: list[int], block: int, mask: Tensor
) -> Tensor:
    T = len(grads) // len(segments)
    like = sample(grads)
    return like.new_empty((n_segments, T, T), dtype=arithmetic_dtype(like.dtype))


@torch.library.register_fake("gradkern::combine.masked")
def _(
    grads: list[Tensor | None],
    w: Tensor,
    segments: list[int],
    units: list[int],
    block: int,
    mask: Tensor,
    out: list[Tensor],
) -> Tensor:
    return mask.new_empty(())


@torch.library.register_fake("gradkern::gather")
def _(grads: list[Tensor | None], numels: list[int], index: Tensor) -> Tensor:
    like = sample(grads)
    return like.new_empty((len(grads) // len(numels), index.shape[0]), dtype=arithmetic_dtype(like.dtype))


@torch.library.register_fake("gradkern::scatter")
def _(values: Tensor, numels: list[int], index: Tensor, out: list[Tensor]) -> None:
    return None


@torch.library.register_fake("gradkern::gradvac")
def _(M: Tensor, keys: Tensor, targets: Tensor, moving: Tensor, beta: float) -> Tensor:
    return torch.empty_like(M, memory_format=torch.contiguous_format)


@torch.library.register_fake("gradkern::pcgrad")
def _(M: Tensor, keys: Tensor | None, partner: str) -> Tensor:
    return torch.empty_like(M, memory_format=torch.contiguous_format)


@torch.library.register_fake("gradkern::pcgrad.matrix")
def _(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    return J.new_empty(J.shape[1])


@torch.library.register_fake("gradkern::pcgrad.tensors")
@torch.library.register_fake("gradkern::gradvac.tensors")
def _(grads: list[Tensor | None], segments: list[int], n_segments: int, *method: object) -> tuple[Tensor, Tensor]:
    T = len(grads) // len(segments)
    like = sample(grads)
    M = like.new_empty((n_segments, T, T), dtype=arithmetic_dtype(like.dtype))
    return M, torch.empty_like(M[:, 0])


@torch.library.register_fake("gradkern::pcgrad.masked")
@torch.library.register_fake("gradkern::gradvac.masked")
def _(
    grads: list[Tensor | None], segments: list[int], n_segments: int, *method: object
) -> tuple[Tensor, Tensor, Tensor]:
    T = len(grads) // len(segments)
    like = sample(grads)
    M = like.new_empty((n_segments, T, T), dtype=arithmetic_dtype(like.dtype))
    return M, torch.empty_like(M[:, 0]), M.new_empty((), dtype=torch.int64)


@torch.library.register_fake("gradkern::adamw")
def _(grads: list[Tensor | None], w: Tensor, segments: list[int], *step: object) -> None:
    return None


@torch.library.register_fake("gradkern::adamw.masked")
def _(
    grads: list[Tensor | None],
    w: Tensor,
    segments: list[int],
    units: list[int],
    block: int,
    mask: Tensor,
    *step: object,
) -> Tensor:
    return mask.new_empty(())
