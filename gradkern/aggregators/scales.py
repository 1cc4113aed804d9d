"""The divisors of task gradients before a method sees them: their losses."""

import torch
from torch import Tensor

from gradkern.arguments import tensor
from gradkern.ops.dtypes import DTYPES


def checked_losses(losses: Tensor | None, M: Tensor, option: str) -> Tensor:
    """Return ``losses``, if they are losses (..., T) for Gramians M; ``option`` is the argument that needs them.

    Raises:
        TypeError: they are not a floating tensor.
        ValueError: they are missing, on another device than M, or their last dimension is not T.
    """
    if losses is None:
        raise ValueError(f"losses must be given with {option}, got None")
    tensor("losses", losses, DTYPES)
    if losses.shape[-1:] != M.shape[-1:]:
        raise ValueError(
            f"losses must have shape (..., {M.shape[-1]}) for M {tuple(M.shape)}, got {tuple(losses.shape)}"
        )
    if losses.device != M.device:
        raise ValueError(f"losses must be on M's device, {M.device}; got {losses.device}")
    return losses


def loss_divisors(losses: Tensor, M: Tensor, present: Tensor | None) -> Tensor:
    """Return the losses as divisors of the rows behind Gramians M: float64, 1 for zero rows and absent tasks.

    A loss that is not a finite number greater than 0 gives NaN.
    """
    scale = torch.where((losses > 0) & losses.isfinite(), losses.detach().double(), torch.nan)
    scale = torch.where(M.diagonal(dim1=-2, dim2=-1) != 0, scale, 1.0)
    return scale if present is None else torch.where(present, scale, 1.0)


def divided(M: Tensor, divisors: Tensor) -> Tensor:
    """Return the Gramians (..., T, T) of the rows behind M divided by ``divisors`` (..., T)."""
    # Two divisions, because the product of two divisors can overflow.
    return M / divisors.unsqueeze(-1) / divisors.unsqueeze(-2)
