"""The losses of a step as the originals take them: one after another, or all in one tensor."""

from typing import Any

import torch
from torch import Tensor

from gradkern import arguments


def listed(name: str, losses: object) -> list[Any]:
    """Return the losses as a list; those of a tensor (T,), such as ``torch.stack(losses)``, are its entries.

    Through one tensor every loss reaches the heads of all tasks, with gradients of 0 for those of the others.

    Raises:
        TypeError: ``losses`` are not in an order, or not several.
    """
    if isinstance(losses, Tensor) and losses.ndim > 0:
        with torch.inference_mode(False), torch.enable_grad():
            return list(losses.unbind())
    return arguments.listed(name, losses, "a sequence or a tensor (T,) with one entry per task")
