"""The whole surgery of gradients left in place, as the operators that do its steps, whatever serves them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.ops.registration import operator, server
from gradkern.ops.schema import arithmetic_dtype, sample

OptionalTensors = Sequence[Tensor | None]


class Masking(NamedTuple):
    """The arguments of the masked overloads."""

    units: Sequence[int]
    block: int
    mask: Tensor
    products: bool


@operator("pcgrad.tensors")
def pcgrad_tensors(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor | None,
    partner: str,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """PCGrad: Gramians and weights."""

    def method(M: Tensor) -> Tensor:
        return server("pcgrad", M.device.type)(M, keys, partner)

    return _surgery(method, grads, segments, n_segments, mean, present, plain, None, out)[:2]


@operator("pcgrad.masked")
def pcgrad_masked(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor | None,
    partner: str,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    units: Sequence[int],
    block: int,
    mask: Tensor,
    products: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """PCGrad under suppression: Gramians, weights, and how many entries were kept."""

    def method(M: Tensor) -> Tensor:
        return server("pcgrad", M.device.type)(M, keys, partner)

    masking = Masking(units, block, mask, products)
    return _surgery(method, grads, segments, n_segments, mean, present, plain, masking, out)


@operator("gradvac.tensors")
def gradvac_tensors(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor,
    targets: Tensor,
    moving: Tensor,
    beta: float,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """GradVac: Gramians and weights."""

    def method(M: Tensor) -> Tensor:
        return server("gradvac", M.device.type)(M, keys, targets, moving & M.isfinite().all(), beta)

    return _surgery(method, grads, segments, n_segments, mean, present, plain, None, out)[:2]


@operator("gradvac.masked")
def gradvac_masked(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    keys: Tensor,
    targets: Tensor,
    moving: Tensor,
    beta: float,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    units: Sequence[int],
    block: int,
    mask: Tensor,
    products: bool,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """GradVac under suppression: Gramians, weights, and how many entries were kept."""

    def method(M: Tensor) -> Tensor:
        return server("gradvac", M.device.type)(M, keys, targets, moving & M.isfinite().all(), beta)

    masking = Masking(units, block, mask, products)
    return _surgery(method, grads, segments, n_segments, mean, present, plain, masking, out)


def _surgery(
    method: Callable[[Tensor], Tensor],
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    masking: Masking | None,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Any]:
    """Fill ``out``; Gramians, weights, and how many entries were kept, None without ``masking``."""
    M = _gramian(grads, segments, n_segments, masking)
    C = method(M)
    if present is not None:
        C = torch.where(present.unsqueeze(-1), C, 0.0)
    w = C.mean(-2) if mean else C.sum(-2)
    outside = w.new_ones(1, w.shape[-1]) if plain is None else plain.to(w.dtype).unsqueeze(0)
    of_all = torch.cat((w, outside))
    places = [s if s >= 0 else n_segments for s in segments]
    device_type = M.device.type
    if masking is None:
        return M, w, server("combine.tensors", device_type)(grads, of_all, places, out)
    units, block, mask, _ = masking
    return M, w, server("combine.masked", device_type)(grads, of_all, places, units, block, mask, out)


def _gramian(grads: OptionalTensors, segments: Sequence[int], n_segments: int, masking: Masking | None) -> Tensor:
    """(S, T, T), of the tensors under surgery."""
    n, like = len(segments), sample(grads)
    under = [k for k, s in enumerate(segments) if s >= 0]
    of_these = [grads[row + k] for row in range(0, len(grads), n) for k in under]
    if all(g is None for g in of_these):
        T = len(grads) // n
        return like.new_zeros((n_segments, T, T), dtype=arithmetic_dtype(like.dtype))
    numbers = [segments[k] for k in under]
    if masking is None or not masking.products:
        return server("gramian.tensors", like.device.type)(of_these, numbers, n_segments)
    units = [masking.units[k] for k in under]
    return server("gramian.masked", like.device.type)(of_these, numbers, n_segments, units, masking.block, masking.mask)
