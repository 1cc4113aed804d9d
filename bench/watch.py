"""Watched functions: where the time of a call goes, by the code that runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from bench import device as machine
from bench.device import Moment

Watched = tuple[str, Any, str]
"""The part of a call that a function belongs to, the function's owner, and its name there."""
Span = tuple[str, Moment, Moment]
"""A part, and the moments at which one of its functions started and ended."""


@contextmanager
def watching(functions: Sequence[Watched], device: torch.device) -> Iterator[list[Span]]:
    """Yield a list to which every call of the functions is added. What a watched function calls belongs to it.

    Args:
        functions: the functions to watch.
        device: the device whose clock counts.
    """
    spans: list[Span] = []
    inside = False

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            inside, start = True, machine.now(device)
            result = function(*args, **kwargs)
            inside, end = False, machine.now(device)
            spans.append((part, start, end))
            return result

        return run

    with ExitStack() as stack:
        for part, owner, name in functions:
            stack.enter_context(patch.object(owner, name, watched(part, getattr(owner, name))))
        yield spans
