"""How the PyTorch back end's functions become operators."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def operator(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register for every device without kernels of its own, with autocast off: it would round the products."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        torch.library.impl(f"gradkern::{name}", "CompositeExplicitAutograd")(without_autocast)
        return without_autocast

    return register
