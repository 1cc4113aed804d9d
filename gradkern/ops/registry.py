"""The registry: an operator is declared once, and back ends register the functions that compute it.

A declaration is a Python function under :func:`operator`. Its signature gives the schema for PyTorch's dispatcher
(``schema.py``), its docstring the contract, and its body an uninitialized result, for tracing.

A back end is a folder beside this file; its ``__init__`` makes a :class:`Backend` and imports its implementations.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from gradkern.ops.schema import arguments_of, schema_of

P = ParamSpec("P")
R = TypeVar("R")

Comparison = tuple[Tensor, Tensor, Tensor]
"""A result, the expected result, and the size of the summed terms: three tensors of one shape."""
Cases = Callable[[torch.dtype, torch.device], Iterator[Comparison]]
C = TypeVar("C", bound=Cases)

DEFAULT = "default"
"""The device type of the back end for devices without one of their own, in the dispatcher's terms."""

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
        self._arguments = arguments_of(function)
        update_wrapper(self, function)
        torch.library.define(f"gradkern::{name}", schema_of(function, writes))
        torch.library.register_fake(f"gradkern::{name}")(self.on_flat(function))
        packet, _, overload = name.partition(".")
        self.overload = getattr(getattr(torch.ops.gradkern, packet), overload or "default")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute the operator. Arguments are positional; the first one holds a tensor."""
        if kwargs:
            raise TypeError(f"arguments of gradkern::{self.name} are positional, got {sorted(kwargs)}")
        flat = self.flattened(*args)
        if torch.compiler.is_compiling() or is_watched() or not _need_no_dispatcher(flat):
            return self.overload(*flat)
        tensor = _first_tensor(flat[0])
        if tensor is None or tensor.is_meta:
            return self.overload(*flat)
        return self.implementation(tensor.device.type)(*args, **kwargs)

    def flattened(self, *args: Any) -> list[Any]:
        """Return the arguments in the form that the dispatcher takes."""
        flat: list[Any] = []
        for argument, value in zip(self._arguments, args, strict=False):  # defaults may be left out
            if argument.group is None:
                flat.append(value)
            else:
                flat.extend([None] * argument.size if value is None else value)
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

    def check(self, cases: C) -> C:
        """Register the decorated function, which compares the operator with the reference for a dtype and a device."""
        self.cases = cases
        return cases

    def on_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` as a function of the dispatcher's arguments, without groups."""
        if all(argument.group is None for argument in self._arguments):
            return function

        def on_flat(*flat: Any) -> Any:
            args, start = [], 0
            for argument in self._arguments:
                args.append(argument.joined(flat[start : start + argument.size]))
                start += argument.size
            return function(*args)

        return on_flat


class Backend:
    """A back end: its name, the devices that it serves, and the reason.

    Args:
        name: the name in messages.
        device_type: the type of the devices that it serves, or ``DEFAULT``.
        reason: a sentence that explains why it serves them.

    Attributes:
        unavailable: the reason why it cannot be used here; None if it can.
    """

    def __init__(self, name: str, device_type: str, reason: str) -> None:
        self.name = name
        self.device_type = device_type
        self.reason = reason
        self.unavailable: str | None = None
        if device_type in backends:
            raise ValueError(f"{backends[device_type].name} serves devices of type {device_type} already, not {name}")
        backends[device_type] = self

    def implements(self, op: Operator[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the back end's implementation of an operator."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
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


def is_watched() -> bool:
    """Return whether a mode, a transform of ``torch.func`` or ``torch.jit.trace`` is active."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return modes or torch._C._is_tracing()


def _need_no_dispatcher(arguments: Sequence[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            if not _NEED_NO_DISPATCHER.issuperset(map(type, argument)):
                return False
        elif type(argument) not in _NEED_NO_DISPATCHER or (isinstance(argument, Tensor) and argument.is_neg()):
            return False
    return True


def _first_tensor(argument: Any) -> Tensor | None:
    if isinstance(argument, Tensor):
        return argument
    for t in argument:
        if isinstance(t, Tensor):
            return t
    return None
