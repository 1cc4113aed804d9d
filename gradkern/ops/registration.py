"""Which function serves an operator on which type of device: for the dispatcher, and for calls that go past it."""

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

serving: dict[str, dict[str, Callable[..., Any]]] = defaultdict(dict)
"""By operator, as "gradkern::name.overload", and device type; "default" serves where no other does."""


def serve(name: str, device_type: str, function: Callable[..., Any]) -> None:
    """Have ``function`` serve an operator on devices of a type, or by "default"."""
    torch.library.impl(f"gradkern::{name}", device_type)(function)
    serving[f"gradkern::{name}"][device_type] = function


def server(name: str, device_type: str) -> Callable[..., Any]:
    """What serves an operator on devices of a type."""
    functions = serving[f"gradkern::{name}"]
    return functions.get(device_type, functions["default"])


def operator(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Serve by default, on every device without kernels of its own.

    Autocast is off in there, for it would round the products; and so is the recording of derivatives, which
    ``autograd.py`` has around the operators.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def numbers_alone(*args: P.args, **kwargs: P.kwargs) -> R:
            first: Any = args[0]
            device_type = _device_type(first)
            recording = isinstance(first, torch.Tensor) and first.requires_grad and torch.is_grad_enabled()
            if not recording and not torch.is_autocast_enabled(device_type):
                return function(*args, **kwargs)
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                return function(*args, **kwargs)

        serve(name, "default", numbers_alone)
        return numbers_alone

    return register


def _device_type(tensors: Any) -> str:
    """Of a tensor, or of the first one in a list."""
    found = tensors if isinstance(tensors, torch.Tensor) else next((t for t in tensors if t is not None), None)
    return "cpu" if found is None else found.device.type
