"""Conversion of operators' arguments to kernels' arguments: rows, tiles, masks and weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.kernels import masks
from gradkern.kernels.rows import Rows, Tiles
from gradkern.ops.arguments import Mask, OptionalTensors, TaskGrads, numels, sample
from gradkern.ops.capture import ready
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import TILE, Layout, tensor_layout
from gradkern.ops.triton.address_tables import table_rows


@dataclass(frozen=True)
class Placed:
    """Gradients left in place, and the tiles that they lie in.

    Attributes:
        addresses: T x n, row-major, 0 for a missing gradient.
        n: the number of parameters.
        dtype: the dtype of the gradients.
        device: the device of the gradients.
        layout: the tiles.
        mask: the mask of dropped entries; None for none.
    """

    addresses: tuple[int, ...]
    n: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    mask: masks.Mask | None

    @property
    def rows(self) -> Rows:
        """The rows, by a table of addresses on the device."""
        return table_rows(self.addresses, self.n, self.dtype, self.device)

    @property
    def tiles(self) -> Tiles:
        """The table of tiles on the device."""
        return tiles_of(self.layout, self.device)


def placed(given: TaskGrads, like: OptionalTensors, mask: Mask | None) -> Placed:
    """Return the places of gradients.

    Args:
        given: the gradients.
        like: row-major, any number of rows; a tensor of each parameter gives its size.
        mask: the mask of dropped entries; None for none.

    Raises:
        ValueError: the block of ``mask`` is out of range.
    """
    if mask is not None and not 1 <= mask.block <= masks.LARGEST_BLOCK:
        raise ValueError(f"block must be from 1 to {masks.LARGEST_BLOCK}, got {mask.block}")
    n = len(given.segments)
    units = () if mask is None else (tuple(mask.units), mask.block)
    layout = tensor_layout(tuple(numels(like, n)), tuple(given.segments), given.n_segments, *units)
    any_tensor = sample((*given.grads, *like))
    device = any_tensor.device
    tile_mask = None
    if mask is not None:
        tile_mask = masks.Mask(ready(layout, device).tiles_on(device)[1], mask.block, mask.state)
    return Placed(given.addresses, n, any_tensor.dtype, device, layout, tile_mask)


def unit_stride(J: Tensor) -> Tensor:
    """Return J itself if its columns are neighbours in memory, else a copy."""
    return J if J.shape[1] <= 1 or J.stride(1) == 1 else J.contiguous()


def tiles_of(layout: Layout, device: torch.device) -> Tiles:
    """Return the layout's table of tiles on the device."""
    return Tiles(ready(layout, device).tiles_on(device)[0], TILE)


def weights_of(name: str, w: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return ``w`` in the form that the kernels read: contiguous, in arithmetic dtype.

    Raises:
        ValueError: its shape is not ``shape``, whose first dimension, of segments, may be left out if it is 1.
    """
    if tuple(w.shape) != shape and not (shape[0] == 1 and tuple(w.shape) == shape[1:]):
        raise ValueError(f"{name} must have shape {shape if shape[0] > 1 else shape[1:]}, got {tuple(w.shape)}")
    return w.to(arithmetic_dtype(dtype)).contiguous()


def kept_counter(kept: Tensor | None, mask: Mask | None) -> Tensor | None:
    """Return the tensor in which a kernel counts the kept entries; it always counts under a mask."""
    return mask.state.new_zeros(()) if mask is not None and kept is None else kept


def is_interpreted(device: torch.device) -> bool:
    """Return whether kernels run in Triton's interpreter, which works on CPU tensors."""
    return device.type == "cpu"
