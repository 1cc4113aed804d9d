"""The PyTorch back end, and how its functions register."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gradkern.ops.registry import DEFAULT, Backend, Operator

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = Backend("pytorch", DEFAULT, "blocked PyTorch operations serve every device that has no kernels of its own")


def implements(operator: Operator[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function, with autocast and autograd switched off inside.

    Autocast would round the products, and ``ops/autograd.py`` differentiates around the operators.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def undifferentiated(*args: P.args, **kwargs: P.kwargs) -> R:
            first: Any = args[0]
            is_tensor = isinstance(first, Tensor)
            device_type = first.device.type if is_tensor else _device_type(first)
            recording = is_tensor and first.requires_grad and torch.is_grad_enabled()
            if not recording and not torch.is_autocast_enabled(device_type):
                return function(*args, **kwargs)
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                return function(*args, **kwargs)

        return BACKEND.implements(operator)(undifferentiated)

    return register


def _device_type(group: Any) -> str:
    """Return the device type of the first tensor in a list, or in a group whose first field is a list."""
    for t in group[0] if hasattr(group, "_fields") else group:
        if t is not None:
            return str(t.device.type)
    return "cpu"
