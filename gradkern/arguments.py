"""Checkers of argument values. Each takes an argument's name and its value, and returns the checked value.

A value of a wrong type raises TypeError, and any other wrong value ValueError. The message names the argument and shows
its value. A bool is not a number, and a string is not a sequence.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

LONGEST = 200
"""The number of characters of a value that an error message shows."""
LEAST_INTEGER, LARGEST_INTEGER = -(2**63), 2**63 - 1
"""The range of the integers that a tensor can hold."""

_NOT_SEQUENCES = (str, bytes, bytearray, memoryview, set, frozenset, Mapping)
"""Types that can be iterated, but whose entries are characters, or are in no order, or are keys."""

C = TypeVar("C")


def integer(name: str, value: object, least: int = LEAST_INTEGER, most: int = LARGEST_INTEGER) -> int:
    """Return ``value`` as an int, if it is an integer of Python or NumPy from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    n = int(value)
    if not least <= n <= most:
        raise ValueError(f"{name} must be an integer from {_power(least)} to {_power(most)}, got {shown(value)}")
    return n


def number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """Return ``value`` as a float, if it is a real number of Python or NumPy in a range. NaN is in no range.

    Args:
        name: the argument's name.
        value: its value.
        least: the smallest number in the range.
        above: a number below all of the range.
        most: the largest number in the range.
        below: a number above all of the range.
        infinite: whether infinity is in a range without upper bound. A finite number too large for float64 raises.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    x = _float(value)
    below_the_end = x < below or (infinite and x == below == math.inf)
    if not (least <= x <= most and above < x and below_the_end):
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        wanted = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        bounded = math.isfinite(max(least, above)) and math.isfinite(min(most, below))
        wanted += [] if bounded else ["not NaN" if infinite else "finite"]
        raise ValueError(f"{name} must be a number that is {' and '.join(wanted)}, got {shown(value)}")
    return x


def numbers(name: str, value: object, least: float = -math.inf) -> list[float]:
    """Return ``value`` as a list of floats, if it holds one or more finite numbers from ``least``, one after another.

    It may be a sequence, a tensor or an array. Its entries may be tensors or arrays of no dimension.
    """
    given = entries(name, value, "a sequence of numbers")
    if not given:
        raise ValueError(f"{name} must hold a number at least, got {shown(value)}")
    return [number(f"{name}[{i}]", plain(entry), least=least) for i, entry in enumerate(given)]


def boolean(name: str, value: object) -> bool:
    """Return ``value``, if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(name: str, value: object, choices: Sequence[C]) -> C:
    """Return ``value``, if it is one of ``choices``, which are strings and may include None."""
    if (isinstance(value, str) or value is None) and value in choices:
        return value  # type: ignore[return-value]  # it is one of them
    wanted = f"{name} must be {_listed(map(repr, choices), 'or')}, got {shown(value)}"
    raise (ValueError if isinstance(value, str) else TypeError)(wanted)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype] = ()) -> Tensor:
    """Return ``value``, if it is a dense tensor of one of ``dtypes``, or of any dtype if there are none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one that is {value.layout}: pass {name}.to_dense()")
    if dtypes and value.dtype not in dtypes:
        allowed = _listed((str(dtype).removeprefix("torch.") for dtype in dtypes), "or")
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}")
    return value


def instance(name: str, value: object, kind: type[C], wanted: str) -> C:
    """Return ``value``, if it is a ``kind``, which the message calls ``wanted``: "a torch.Generator"."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    return value


def sequence(name: str, value: object, wanted: str) -> Sequence[Any]:
    """Return ``value``, if it is a sequence, which the message calls ``wanted``: "a sequence of losses"."""
    if not isinstance(value, Sequence) or isinstance(value, _NOT_SEQUENCES):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    return value


def entries(name: str, value: object, wanted: str) -> list[Any]:
    """Return ``value`` as a list, if it can be iterated in an order that means something.

    A tensor or an array gives numbers, or lists of numbers.
    """
    given = plain(value)
    if not isinstance(given, Iterable) or isinstance(given, _NOT_SEQUENCES):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    return list(given)


def listed(name: str, value: object, wanted: str) -> list[Any]:
    """Return ``value`` as a list, if it can be iterated in order, as an iterator too, and is no tensor."""
    if not isinstance(value, Iterable) or isinstance(value, (Tensor, Set, *_NOT_SEQUENCES)):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    return list(value)


def mapping(name: str, value: object, keys: Sequence[str]) -> Mapping[str, Any]:
    """Return ``value``, if it is a mapping with exactly the given keys."""
    wanted = f"{name} must hold {_listed(map(repr, keys), 'and')}"
    if not isinstance(value, Mapping):
        raise TypeError(f"{wanted}, got {shown(value)}")
    if set(value) != set(keys):
        raise ValueError(f"{wanted}, got {shown(list(value))}")
    return value


def shown(value: object) -> str:
    """Return ``value`` as an error message shows it: in one line, and shortened if it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integer of more than some thousand digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def plain(value: Any) -> Any:
    """Return a tensor or an array as numbers or lists of numbers, and any other value as it is."""
    if not hasattr(value, "tolist"):
        return value
    try:
        return value.tolist()
    except RuntimeError:  # a tensor without numbers, or not a dense one
        return None


def _float(value: Real) -> float:
    """Return the nearest float, and NaN for a number that is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _power(bound: int) -> str:
    """Return a bound of a range of integers; long ones are written as powers of two."""
    size = abs(bound)
    if size >= 2**20 and size & (size - 1) == 0:
        return f"{'-' if bound < 0 else ''}2**{size.bit_length() - 1}"
    if size >= 2**20 and size & (size + 1) == 0 and bound > 0:
        return f"2**{size.bit_length()} - 1"
    return str(bound)


def _listed(words: Iterable[str], conjunction: str) -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last
