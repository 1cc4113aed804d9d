"""What the kernels take, from the arguments of the operators: rows, layouts, masks and weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.kernels.masks import LARGEST_BLOCK, Mask
from gradkern.ops.capture import ready
from gradkern.ops.layout import Layout, tensor_layout
from gradkern.ops.schema import arithmetic_dtype, numels, sample
from gradkern.ops.triton.address_tables import OptionalTensors, addresses


class Suppressed(NamedTuple):
    """The arguments of the masked overloads."""

    units: tuple[int, ...]
    block: int
    mask: Tensor


def suppressed(units: Sequence[int], block: int, mask: Tensor) -> Suppressed:
    """Checked."""
    if not 1 <= block <= LARGEST_BLOCK:
        raise ValueError(f"block must be from 1 to {LARGEST_BLOCK}, got {block}")
    return Suppressed(tuple(units), block, mask)


def unit_stride(J: Tensor) -> Tensor:
    """J itself if its columns are neighbours in memory, else a copy."""
    return J if J.shape[1] <= 1 or J.stride(1) == 1 else J.contiguous()


def tensor_rows(
    grads: OptionalTensors,
    segments: Sequence[int],
    n_segments: int,
    like: OptionalTensors,
    suppression: Suppressed | None,
) -> tuple[tuple[int, ...], Tensor, Layout]:
    """The gradients' addresses, one gradient as a sample of dtype and device, and their layout.

    ``like`` has the size of tensor k at every index that is k modulo the number of tensors.
    """
    n = len(segments)
    rows = addresses("grads", grads)
    units = () if suppression is None else (suppression.units, suppression.block)
    return rows, sample((*grads, *like)), tensor_layout(tuple(numels(like, n)), tuple(segments), n_segments, *units)


def tiles_of(layout: Layout, device: torch.device) -> Tensor:
    """The layout's table of tiles on the device."""
    return ready(layout, device).tiles_on(device)[0]


def mask_of(suppression: Suppressed | None, layout: Layout, device: torch.device) -> Mask | None:
    """The mask over a layout that was made for it; None for none."""
    if suppression is None:
        return None
    return Mask(ready(layout, device).tiles_on(device)[1], suppression.block, suppression.mask)


def weights_of(name: str, w: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """``w`` as the kernels read it: contiguous, in arithmetic dtype, with a dimension of segments."""
    if tuple(w.shape) != shape and not (shape[0] == 1 and tuple(w.shape) == shape[1:]):
        raise ValueError(f"{name} must have shape {shape if shape[0] > 1 else shape[1:]}, got {tuple(w.shape)}")
    return w.to(arithmetic_dtype(dtype)).contiguous()
