"""Schemas of operators, derived from the signatures of Python functions.

An argument may be a NamedTuple of values that belong together: the schema has its fields one after another. An argument
that may be None has optional fields, and is None where all of them are.
"""

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

_TYPES = {
    Tensor: "Tensor",
    Sequence[Tensor | None]: "Tensor?[]",
    Sequence[Tensor]: "Tensor[]",
    list[Tensor]: "Tensor[]",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}


@dataclass(frozen=True)
class Argument:
    """One argument of a function, as fields of a schema.

    Attributes:
        group: the NamedTuple that it is, or None for a single field.
        fields: names and types, as the schema has them.
        default: the default, None where there is none.
        has_default: whether there is one.
    """

    group: Callable[..., Any] | None
    fields: list[tuple[str, str]]
    default: Any
    has_default: bool

    @property
    def size(self) -> int:
        """The number of fields."""
        return len(self.fields)

    def joined(self, fields: Sequence[Any]) -> Any:
        """Return the value of its fields; PyTorch's dispatcher leaves out fields at the end that equal a default."""
        if self.group is None:
            return fields[0] if fields else self.default
        if all(field is None for field in fields):
            return None
        return self.group(*fields, *[None] * (self.size - len(fields)))


def arguments_of(function: Callable[..., Any]) -> list[Argument]:
    """Return the arguments of a function with type hints."""
    hints = typing.get_type_hints(function)
    return [_argument(parameter, hints[name]) for name, parameter in signature(function).parameters.items()]


def schema_of(function: Callable[..., Any], writes: Sequence[str]) -> str:
    """Return the schema of a function, without a name.

    Args:
        function: has type hints.
        writes: the arguments, or fields of arguments, that it writes to.
    """
    aliases = iter("abcdefgh")
    fields = []
    for argument in arguments_of(function):
        default = f"={argument.default}" if argument.has_default else ""
        for name, of_field in argument.fields:
            alias = f"({next(aliases)}!)" if name in writes else ""
            fields.append(f"{of_field.replace('Tensor', 'Tensor' + alias, 1)} {name}{default}")
    return f"({', '.join(fields)}) -> {_returned(function)}"


def _argument(parameter: Parameter, hint: Any) -> Argument:
    has_default = parameter.default is not Parameter.empty
    default = parameter.default if has_default else None
    inner, optional = _without_none(hint)
    if not hasattr(inner, "_fields"):
        return Argument(None, [(parameter.name, _type(hint))], default, has_default)
    hints = typing.get_type_hints(inner)
    fields = [(name, _type(hints[name] | None if optional else hints[name])) for name in inner._fields]
    return Argument(inner, fields, default, has_default)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return ``X`` and True for ``X | None``, and ``X`` and False for any other hint."""
    if isinstance(hint, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def _type(hint: Any) -> str:
    inner, optional = _without_none(hint)
    return _TYPES[inner] + ("?" if optional else "")


def _returned(function: Callable[..., Any]) -> str:
    hint = typing.get_type_hints(function)["return"]
    if hint is type(None):
        return "()"
    several = typing.get_args(hint)
    return f"({', '.join(map(_type, several))})" if several else _type(hint)
