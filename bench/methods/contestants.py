"""Every row of METHODS, and TorchJD's method of the same name where there is one."""

import inspect
import sys
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.method import Method
from gradkern.ops import gramian

OURS, THEIRS, COPY = "gradkern", "TorchJD", "copy"
P_OF_GRAMIANS = 1000
THEIR_NAMES = {"RGW": "Random", "k": "trim_number"}
"""TorchJD's names of our classes and their arguments, where they differ."""
Calls = dict[str, Callable[[], object]]


def rows(T: int, P: int, dtype: torch.dtype) -> Tensor:
    """Return T rows of which every other two conflict, and all have a direction in common.

    So every method has a solution and work to do. Cosines are near -0.2 and 0.6. Lengths are near 1, for which the
    rates of methods with double sampling are made.
    """
    J, common, between = torch.randn(T, P, dtype=dtype), torch.randn(P, dtype=dtype), torch.randn(P, dtype=dtype)
    sides = torch.tensor([(-1.0) ** i for i in range(T)], dtype=dtype)
    return (J + 0.7 * common + sides.outer(between)) / (2.5 * P) ** 0.5


def of_weights(method: Method, T: int) -> Calls:
    """Return calls that compute the weights alone, from a float64 Gramian.

    Raises:
        Exception: the method has none without entries of the gradients, or is not for T tasks.
    """
    J = rows(T, P_OF_GRAMIANS, torch.float64)
    M, made = gramian(J), method.make(**_arguments(method, T))
    if made.needs_entries:
        raise ValueError("they follow from entries of the gradients, which a Gramian does not have")
    takes_losses = "losses" in inspect.signature(made.weights).parameters
    given = _losses(made, T) if takes_losses else {}
    calls: Calls = {OURS: lambda: made.weights(M, **given)}
    theirs = _theirs(method, T, "Weighting")
    if theirs is not None:
        calls[THEIRS] = lambda: theirs(M)
    elif (whole := _theirs(method, T)) is not None:
        # TorchJD's takes rows only. These have the Gramian M, and are as few numbers as can be.
        short = torch.linalg.cholesky(M)
        find = whole.weighting if _has_weights(whole) else whole
        calls[THEIRS] = lambda: find(short)
    return calls


def of_aggregation(method: Method, T: int, P: int) -> Calls:
    """Return calls that aggregate float32 rows (T, P), and one that copies them."""
    J, made = rows(T, P, torch.float32), method.make(**_arguments(method, T))
    target, given = torch.empty_like(J), _losses(made, T)
    if method.second:
        given["second"] = rows(T, P, torch.float32)
    calls: Calls = {COPY: lambda: target.copy_(J), OURS: lambda: made(J, **given)}
    theirs = _theirs(method, T)
    if theirs is not None:
        calls[THEIRS] = lambda: theirs(J)
    elif method.second and (weighting := _theirs(method, T, "Weighting")) is not None:  # as in its documentation
        calls[THEIRS] = lambda: weighting(J @ given["second"].T) @ J
    return calls


def _losses(made: Aggregator, T: int) -> dict[str, Tensor]:
    return {"losses": torch.linspace(0.5, 2.0, T)} if made.needs_losses else {}


def _arguments(method: Method, T: int) -> dict[str, Any]:
    """Return the row's arguments, of which those for a certain number of tasks are made to fit T."""
    arguments = dict(method.arguments)
    if "T" in arguments:
        arguments["T"] = T
    if "weights" in arguments:
        arguments["weights"] = tuple(islice(cycle(arguments["weights"]), T))
    return arguments


def _has_weights(whole: Any) -> bool:
    """Return whether an aggregator's ``weighting`` gives the weights of the rows. ConFIG's gives its preference."""
    return isinstance(whole, (_Missing, sys.modules["torchjd.aggregation"].WeightedAggregator))


def _theirs(method: Method, T: int, suffix: str = "") -> Any:
    """Return TorchJD's object of the class's name, with the row's arguments; None if there is none that takes them.

    Arguments that the row leaves open are those of our class, or TorchJD's own. Theirs are found by their names.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        return _Missing(error)
    name = method.aggregator.__name__
    cls = getattr(aggregation, THEIR_NAMES.get(name, name) + suffix, None)
    if cls is None:
        return None
    taken = inspect.signature(cls).parameters
    ours = {name: p.default for name, p in inspect.signature(method.aggregator).parameters.items()}
    of_row = {THEIR_NAMES.get(name, name): value for name, value in _arguments(method, T).items()}
    if any(name not in taken and value != ours[name] for name, value in of_row.items()):
        return None
    known = {"n_tasks": T} | ours | of_row
    arguments = {name: known[name] for name, p in taken.items() if name in of_row or _needed(name, known, p)}
    if isinstance(arguments.get("weights"), tuple):
        arguments["weights"] = torch.tensor(arguments["weights"])
    try:
        return cls(**arguments)
    except ImportError as error:  # a library that TorchJD's method needs; measuring tells it, and goes on with ours
        return _Missing(error)


class _Missing:
    """A method of TorchJD's, or its weighting, that lacks a library: every call raises the error."""

    def __init__(self, error: ImportError) -> None:
        self.error = error

    def __call__(self, x: Tensor) -> Tensor:
        raise self.error

    weighting = __call__


def _needed(name: str, known: dict[str, Any], taken: inspect.Parameter) -> bool:
    """Return whether an argument must be given, because TorchJD's has no default, and is known."""
    return taken.default is taken.empty and known.get(name, taken.empty) is not taken.empty
