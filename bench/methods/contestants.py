"""Every row of METHODS, and TorchJD's method of the same name where there is one."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.method import Method
from gradkern.ops import gramian

OURS, THEIRS, COPY = "gradkern", "TorchJD", "copy"
P_OF_GRAMIANS = 1000
Calls = dict[str, Callable[[], object]]


def supports(method: Method, T: int) -> bool:
    """Return whether the row is made for T tasks."""
    return method.tasks in (None, T)


def rows(T: int, P: int, dtype: torch.dtype) -> Tensor:
    """Return T rows of which some conflict, and all have a direction in common, so that every method has a solution."""
    J = torch.randn(T, P, dtype=dtype)
    return (J + J.mean(0) * T**0.5).contiguous()


def of_weights(method: Method, T: int) -> Calls:
    """Return calls that compute the weights alone, from a float64 Gramian.

    Raises:
        Exception: the method has none without entries of the gradients.
    """
    J = rows(T, P_OF_GRAMIANS, torch.float64)
    M, made = gramian(J), method.make()
    if made.needs_entries:
        raise ValueError("they follow from entries of the gradients, which a Gramian does not have")
    given = _losses(made, T)
    calls: Calls = {OURS: lambda: made.weights(M, **given)}
    theirs = _theirs(method, T, "Weighting")
    if theirs is not None:
        calls[THEIRS] = lambda: theirs(M)
    elif (whole := _theirs(method, T)) is not None and hasattr(whole, "weighting"):
        # TorchJD's takes rows only. These have the Gramian M, and are as few numbers as can be.
        short = torch.linalg.cholesky(M)
        calls[THEIRS] = lambda: whole.weighting(short)
    return calls


def of_aggregation(method: Method, T: int, P: int) -> Calls:
    """Return calls that aggregate float32 rows (T, P), and one that copies them."""
    J, made = rows(T, P, torch.float32), method.make()
    target, given = torch.empty_like(J), _losses(made, T)
    calls: Calls = {COPY: lambda: target.copy_(J), OURS: lambda: made(J, **given)}
    theirs = _theirs(method, T)
    if theirs is not None:
        calls[THEIRS] = lambda: theirs(J)
    return calls


def _losses(made: Aggregator, T: int) -> dict[str, Tensor]:
    return {"losses": torch.linspace(0.5, 2.0, T)} if made.needs_losses else {}


def _theirs(method: Method, T: int, suffix: str = "") -> Any:
    """Return TorchJD's object of the class's name, with the row's arguments; None if there is none that takes them.

    Arguments that the row leaves open are those of our class, or TorchJD's own. Theirs are found by their names.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        return _Missing(error)
    cls = getattr(aggregation, method.aggregator.__name__ + suffix, None)
    if cls is None:
        return None
    taken = inspect.signature(cls).parameters
    ours = {name: p.default for name, p in inspect.signature(method.aggregator).parameters.items()}
    if any(name not in taken and value != ours[name] for name, value in method.arguments.items()):
        return None
    known = {"n_tasks": T} | ours | dict(method.arguments)
    arguments = {name: known[name] for name, p in taken.items() if name in known and _matters(name, known, p, method)}
    if isinstance(arguments.get("weights"), tuple):
        arguments["weights"] = torch.tensor(arguments["weights"])
    try:
        return cls(**arguments)
    except ImportError as error:  # a library that TorchJD's method needs; measuring tells it, and goes on with ours
        return _Missing(error)


class _Missing:
    """A method of TorchJD's that lacks a library: every call raises the error."""

    def __init__(self, error: ImportError) -> None:
        self.error = error

    def __call__(self, x: Tensor) -> Tensor:
        raise self.error

    weighting = __call__


def _matters(name: str, known: dict[str, Any], taken: inspect.Parameter, method: Method) -> bool:
    """Return whether an argument must be given: it is the row's, or TorchJD's has no default."""
    return name in method.arguments or (taken.default is taken.empty and known[name] is not inspect.Parameter.empty)
