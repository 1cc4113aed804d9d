"""The loss of a task that not all examples have a label for."""

import torch
from torch import Tensor

from gradkern.arguments import tensor


def masked_mean(values: Tensor, present: Tensor) -> Tensor | None:
    """Return the mean loss over the examples that have a label; None if none has, which is an absent task's entry.

    A mean over all examples, with zeros where a label is missing, shrinks a task's gradient with its share of labels.
    A batch without any label would still count as a task then, with a gradient of zeros.

    The host reads ``present`` from the device. An example without a label still takes part in the backward pass, with a
    gradient of zero. So give it a label for which the loss is finite, such as 0.

    Args:
        values: the losses of the examples, floating, of any shape: (N,), or (N, L) for L tokens each.
        present: which of them count, bool, of the same shape.

    Returns:
        (), of the dtype of ``values``; or None.

    Raises:
        TypeError, ValueError: an argument is not as said above.
    """
    tensor("values", values)
    if not values.is_floating_point():
        raise TypeError(f"values must be floating, got {values.dtype}")
    tensor("present", present, (torch.bool,))
    if present.shape != values.shape:
        raise ValueError(f"present must have the shape of values, {tuple(values.shape)}, got {tuple(present.shape)}")
    if present.device != values.device:
        raise ValueError(f"present must be on the device of values, {values.device}, got {present.device}")
    chosen = values[present]
    return chosen.mean() if chosen.numel() else None
