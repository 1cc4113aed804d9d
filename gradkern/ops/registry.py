"""The registry: an operator is declared once, and back ends register the functions that compute it.

A declaration is a Python function under :func:`operator`. Its signature gives the schema for PyTorch's dispatcher, its
docstring the contract, and its body an uninitialized result, for tracing. An argument may be a NamedTuple of values
that belong together: the schema lists its fields one after another.

A back end is a folder beside this file; its ``__init__`` makes a :class:`Backend` and imports its implementations.
"""

import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from inspect import Parameter, signature
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

Comparison = tuple[Tensor, Tensor, Tensor]
"""A result, the expected result, and the size of the summed terms: three tensors of one shape."""
Cases = Callable[[torch.dtype, torch.device], Iterator[Comparison]]

DEFAULT = "default"
"""The device type of the back end for devices without one of their own, in the dispatcher's terms."""

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Sequence[Tensor | None]: "Tensor?[]",
    Sequence[Tensor]: "Tensor[]",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
}
_NEED_NO_DISPATCHER = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))
"""Argument types, and element types of lists, that need no dispatcher."""


class Operator(Generic[P, R]):
    """An operator of ``torch.ops.gradkern``, called as a function.

    A call goes straight to the implementation for the tensors' device, because the dispatcher takes 0.1 µs for every
    tensor of a list. A call goes through the dispatcher if something must see the operator: ``torch.compile`` and other
    tracing, modes such as FakeTensorMode, transforms of ``torch.func``, tensor subclasses and lazily negated tensors.

    Attributes:
        name: "name" or "name.overload".
        overload: the operator in the dispatcher.
        implementations: the functions that compute it, by device type.
        cases: comparisons of its results with :mod:`gradkern.reference`, for the self-check; see :meth:`check`.
    """

    def __init__(self, name: str, function: Callable[P, R], writes: Sequence[str]) -> None:
        self.name = name
        self.implementations: dict[str, Callable[P, R]] = {}
        self.cases: Cases | None = None
        self._groups = [_Group.of(p, hint) for p, hint in _parameters(function)]
        update_wrapper(self, function)
        fields = ", ".join(self._schema_fields(function, writes))
        torch.library.define(f"gradkern::{name}", f"({fields}) -> {_returned(function)}")
        torch.library.register_fake(f"gradkern::{name}")(self.on_flat(function))
        packet, _, overload = name.partition(".")
        self.overload = getattr(getattr(torch.ops.gradkern, packet), overload or "default")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute the operator. Arguments are positional; the first one holds a tensor."""
        assert not kwargs, "arguments are positional"
        flat = self.flattened(*args)
        if torch.compiler.is_compiling() or _is_watched() or not all(map(_needs_no_dispatcher, flat)):
            return self.overload(*flat)
        tensor = _first_tensor(flat[0])
        if tensor is None or tensor.is_meta:
            return self.overload(*flat)
        return self.implementation(tensor.device.type)(*args, **kwargs)

    def flattened(self, *args: Any) -> list[Any]:
        """Return the arguments in the form that the dispatcher takes."""
        flat: list[Any] = []
        for group, argument in zip(self._groups, args, strict=False):
            if group.kind is None:
                flat.append(argument)
            else:
                flat += [None] * group.size if argument is None else argument
        return flat

    def implementation(self, device_type: str) -> Callable[P, R]:
        """Return the function that computes the operator on devices of a type."""
        found = self.implementations.get(device_type) or self.implementations.get(DEFAULT)
        if found is None:
            raise NotImplementedError(f"gradkern::{self.name} has no implementation for devices of type {device_type}")
        return found

    def register(self, device_type: str, function: Callable[P, R]) -> None:
        """Register ``function`` to compute the operator on devices of a type."""
        self.implementations[device_type] = function
        torch.library.impl(f"gradkern::{self.name}", device_type)(self.on_flat(function))

    def check(self, cases: Cases) -> Cases:
        """Register the decorated function, which compares the operator with the reference for a dtype and a device."""
        self.cases = cases
        return cases

    def on_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` as a function of the dispatcher's arguments, without groups."""
        if all(group.kind is None for group in self._groups):
            return function

        def on_flat(*flat: Any) -> Any:
            args, start = [], 0
            for group in self._groups:
                fields = flat[start : start + group.size]
                args.append(group.joined(fields))
                start += group.size
            return function(*args)

        return on_flat

    def _schema_fields(self, function: Callable[..., Any], writes: Sequence[str]) -> list[str]:
        aliases = iter("abcdefgh")
        fields = []
        for (parameter, _), group in zip(_parameters(function), self._groups, strict=True):
            default = "" if parameter.default is Parameter.empty else f"={parameter.default}"
            for name, of_field in group.fields:
                written = f"({next(aliases)}!)" if name in writes else ""
                fields.append(f"{of_field.replace('Tensor', 'Tensor' + written, 1)} {name}{default}")
        return fields


@dataclass(frozen=True)
class _Group:
    """One argument of a declaration, as fields of the schema.

    Attributes:
        kind: the NamedTuple of the argument, or None for a single field.
        fields: the names and types in the schema.
        default: the default, None if there is none.
    """

    kind: Callable[..., Any] | None
    fields: list[tuple[str, str]]
    default: Any

    @classmethod
    def of(cls, parameter: Parameter, hint: Any) -> "_Group":
        default = None if parameter.default is Parameter.empty else parameter.default
        inner, optional = _without_none(hint)
        if not hasattr(inner, "_fields"):
            return cls(None, [(parameter.name, _schema_type(hint))], default)
        hints = typing.get_type_hints(inner)
        fields = [(name, _schema_type(hints[name] | None if optional else hints[name])) for name in inner._fields]
        return cls(inner, fields, default)

    @property
    def size(self) -> int:
        return len(self.fields)

    def joined(self, fields: Sequence[Any]) -> Any:
        """Return the argument made of its fields. The dispatcher omits fields at the end that equal their defaults."""
        if self.kind is None:
            return fields[0] if fields else self.default
        if all(field is None for field in fields):
            return None
        return self.kind(*fields, *[None] * (self.size - len(fields)))


class Backend:
    """A back end: its name, the devices that it serves, and the reason.

    Args:
        name: the name in messages.
        device_type: the type of the devices that it serves, or ``DEFAULT``.
        reason: a sentence that explains why it serves them.
        unavailable: the reason why it cannot be used here; None if it can.
    """

    def __init__(self, name: str, device_type: str, reason: str, unavailable: str | None = None) -> None:
        self.name = name
        self.device_type = device_type
        self.reason = reason
        self.unavailable = unavailable
        backends[device_type] = self

    def implements(self, *operators: Operator[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the back end's implementation of an operator."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            for op in operators:
                op.register(self.device_type, function)
            return function

        return register


operators: dict[str, Operator[..., Any]] = {}
"""All operators by name, in the order of their declarations."""
backends: dict[str, Backend] = {}
"""All back ends by the device type that they serve."""


def operator(name: str, writes: Sequence[str] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Declare the decorated function as an operator; see the module.

    Args:
        name: "name" or "name.overload".
        writes: the arguments, or fields of arguments, that it writes to.
    """

    def declare(function: Callable[P, R]) -> Operator[P, R]:
        operators[name] = declared = Operator(name, function, writes)
        return declared

    return declare


def load_backends(folder: Any) -> None:
    """Import every package in ``folder``, so that the back ends register themselves."""
    for module in pkgutil.iter_modules(folder.__path__):
        if module.ispkg:
            importlib.import_module(f"{folder.__name__}.{module.name}")


def _parameters(function: Callable[..., Any]) -> list[tuple[Parameter, Any]]:
    hints = typing.get_type_hints(function)
    return [(parameter, hints[name]) for name, parameter in signature(function).parameters.items()]


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return ``X`` and True for ``X | None``, and ``X`` and False for any other hint."""
    if isinstance(hint, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def _schema_type(hint: Any) -> str:
    inner, optional = _without_none(hint)
    return _SCHEMA_TYPES[inner] + ("?" if optional else "")


def _returned(function: Callable[..., Any]) -> str:
    hint = typing.get_type_hints(function)["return"]
    if hint is type(None):
        return "()"
    several = typing.get_args(hint)
    return f"({', '.join(map(_schema_type, several))})" if several else _schema_type(hint)


def _is_watched() -> bool:
    """Return whether a mode, a transform of ``torch.func`` or ``torch.jit.trace`` is active."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return modes or torch._C._is_tracing()


def _needs_no_dispatcher(argument: Any) -> bool:
    if isinstance(argument, Tensor):
        return type(argument) in _NEED_NO_DISPATCHER and not argument.is_neg()
    if isinstance(argument, list | tuple):
        return _NEED_NO_DISPATCHER.issuperset(map(type, argument))
    return type(argument) in _NEED_NO_DISPATCHER


def _first_tensor(argument: Any) -> Tensor | None:
    return argument if isinstance(argument, Tensor) else next((t for t in argument if t is not None), None)
