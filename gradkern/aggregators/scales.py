"""The losses of the tasks as methods take them: checked, and as the divisors of task gradients."""

import torch
from torch import Tensor

from gradkern.aggregators.solvers.arrays import on_host
from gradkern.arguments import tensor
from gradkern.ops.dtypes import DTYPES


def checked_losses(losses: Tensor | None, rows: Tensor, option: object, batched: bool = False) -> Tensor:
    """Return ``losses``, if they are the losses of the tasks of a matrix or of Gramians, ``rows`` (..., T, any).

    Args:
        losses: (T,), or (..., T) if ``batched``.
        rows: the matrix or the Gramians.
        option: what needs the losses, for the message.
        batched: whether each Gramian may have its own.

    Raises:
        TypeError: they are not a floating tensor.
        ValueError: they are missing, on another device than ``rows``, or of another shape.
    """
    if losses is None:
        raise ValueError(f"losses must be given with {option}, got None")
    tensor("losses", losses, DTYPES)
    T = rows.shape[-2]
    if losses.shape[-1:] != (T,) or (losses.ndim > 1 and not batched):
        wanted = f"(..., {T})" if batched else f"({T},)"
        raise ValueError(f"losses must have shape {wanted} for {T} tasks, got {tuple(losses.shape)}")
    if losses.device != rows.device:
        raise ValueError(f"losses must be on the gradients' device, {rows.device}; got {losses.device}")
    return losses


def check_positive(losses: Tensor, why: str) -> None:
    """Raise ValueError if a loss (..., T) on the CPU is not above 0. On other devices the host would have to wait."""
    if not on_host(losses):
        return
    T = losses.shape[-1]
    for place, loss in enumerate(losses.reshape(-1).tolist()):
        if loss <= 0:
            raise ValueError(f"losses[{place % T}] must be above 0, because {why}; got {loss}")


def loss_divisors(losses: Tensor, M: Tensor, present: Tensor | None) -> Tensor:
    """Return the losses as divisors of the rows behind Gramians M: float64, 1 for zero rows and absent tasks.

    A loss that is not finite gives NaN, and so does one that is not above 0 where the host may not look.

    Raises:
        ValueError: a loss on the CPU is not above 0.
    """
    divides = M.diagonal(dim1=-2, dim2=-1) != 0
    divides = divides if present is None else divides & present
    scale = torch.where(divides, losses.detach().double(), 1.0)
    check_positive(scale, "gradients are divided by them")
    return torch.where((scale > 0) & scale.isfinite(), scale, torch.nan)


def divided(M: Tensor, divisors: Tensor) -> Tensor:
    """Return the Gramians (..., T, T) of the rows behind M divided by ``divisors`` (..., T)."""
    # Two divisions, because the product of two divisors can overflow.
    return M / divisors.unsqueeze(-1) / divisors.unsqueeze(-2)
