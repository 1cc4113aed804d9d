"""Comparisons of a list of tensors with an earlier one: by their properties, in C++, in .04 µs a tensor.

They are those by which ``torch.compile`` decides whether it may run code that it compiled for other inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Comparison = Callable[..., bool]
"""Takes n tensors, and returns whether they are distinct, and the same as n others in classes, dtypes, devices, shapes,
strides, ``requires_grad``, and in what else decides how PyTorch dispatches them: layouts, lazy negation, modes.
None of the n may be a nested tensor: PyTorch would end the process."""

_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def comparison_with(tensors: Sequence[Tensor]) -> Comparison:
    """Return a comparison of n others with n distinct tensors. It keeps none of them alive.

    Where PyTorch cannot compare, no tensors are the same, and the caller looks at each.
    """
    try:
        check: Comparison = _guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (AttributeError, TypeError, RuntimeError):  # private API of PyTorch; and some tensors have no shape
        return unlike
    return check


def unlike(*others: Any) -> bool:
    """Return False: a comparison with nothing."""
    return False
