"""A public callable: a right call of it, and wrong values for each of its arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tests.arguments.values import Values

Wrong = dict[str, Callable[[], Values]]


class Prepared(NamedTuple):
    """A right call, and what must not change if an argument is wrong."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    state: Callable[[], Any] = lambda: None


class Call(NamedTuple):
    """A public callable: its qualified name, a right call, wrong values for each argument, and what sets it apart."""

    name: str
    prepare: Callable[[], Prepared]
    wrong: Wrong
    variant: str = ""


def copied(x: Any) -> Any:
    """Return a copy of tensors in lists and dictionaries, as lists, that can be compared."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return [(str(key), copied(value)) for key, value in x.items()]
    if isinstance(x, list | tuple):
        return [copied(value) for value in x]
    return x
