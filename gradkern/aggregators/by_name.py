"""Methods by their names, as a configuration file or a command line gives them."""

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.methods import METHODS
from gradkern.arguments import instance, shown


def aggregator(name: str, **options: Any) -> Aggregator:
    """Return a new method by the name that ``gradkern methods`` lists.

    ``gk.aggregator("pcgrad-random", reduction="mean")`` is ``gk.PCGrad(partner="random", reduction="mean")``.

    Args:
        name: the name. Case does not matter, and "_" is the same as "-".
        **options: arguments of the method's class. They take the place of those that the name stands for. Arguments
            that depend on the number of tasks, as in ``gk.aggregator("uncertainty", T=3)``, must be given.

    Raises:
        TypeError: ``name`` is not a string, the class has no such option, or one that it needs is missing.
        ValueError: no method has this name. The message lists all names. Or an option has a wrong value.
    """
    method = METHODS[one_of(METHODS, name, "name")]
    known = inspect.signature(method.aggregator).parameters
    for option in options:
        if option not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise TypeError(f"{option} is no option of {method.name!r}: {method.aggregator.__name__} {has}")
    if method.tasks is None:
        return method.make(**options)
    # The row's arguments are examples, for as many tasks as comparisons have, and stand for nothing.
    for needed in (option for option, of in known.items() if of.default is of.empty and option not in options):
        call = f"gradkern.aggregator({method.name!r}, {needed}={method.arguments[needed]!r})"
        raise TypeError(f"{needed} must be given for {method.name!r}, as in {call} for {method.tasks} tasks")
    return method.aggregator(**options)


def one_of(names: Iterable[str], given: str, argument: str) -> str:
    """Return the name that ``given`` stands for; case, "_" and "-" do not matter: "NashMTL" is "nash-mtl".

    Args:
        names: the names, in lower case and with "-".
        given: what a user wrote.
        argument: what it is given for, for the messages.

    Raises:
        TypeError: ``given`` is not a string.
        ValueError: it is none of the names. The message has the closest one, if one is close, and all names.
    """
    written = instance(argument, given, str, "a string").strip().lower().replace("_", "-")
    known = list(names)
    for name in known:
        if name.replace("-", "") == written.replace("-", ""):
            return name
    close = get_close_matches(written, known, n=1)
    hint = f" (the closest is {close[0]!r})" if close else ""
    raise ValueError(f"{argument} must be one of {', '.join(known)}; got {shown(given)}{hint}")


_OTHER_NAMES = {"random": "rgw", "crmogm": "smoothed"}
"""What TorchJD calls methods that have another name here, in lower case: its random weights are of the gradients."""


def is_aggregator(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an aggregator.

    If its class has the name of one here, as TorchJD's and LibMTL's classes have, or is TorchJD's weighting of that
    name, the message says what to pass.
    """
    if isinstance(value, Aggregator):
        return
    wanted = f"{argument} must be a gradkern.Aggregator, got {shown(value)}"
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    ours = {name.lower(): name for name in (method.aggregator.__name__ for method in METHODS.values())}
    for kind in kinds:
        name = kind.__name__.removesuffix("Weighting").replace("_", "").lower()
        twin = _OTHER_NAMES.get(name, name)
        if twin in ours:
            raise TypeError(f"{wanted}: pass gradkern.{ours[twin]}(...)")
    if isinstance(value, str):
        raise TypeError(f"{wanted}: pass gradkern.aggregator({value!r})")
    raise TypeError(f"{wanted}: the command 'gradkern methods' lists them")
