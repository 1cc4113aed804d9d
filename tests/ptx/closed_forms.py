"""What each instruction on numbers gives, computed element by element from Python's integers, fractions and NumPy."""

import operator
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import copysign, isfinite, isnan, nan
from typing import Any

import numpy as np
import torch

from tests.ptx.snippets import DTYPES

Number = Any


def bits_of(kind: str) -> int:
    return 8 * DTYPES[kind].itemsize if kind != "pred" else 1


def wrapped(value: int, kind: str) -> int:
    """Return an integer as the type holds it."""
    bits = bits_of(kind)
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


# Integers


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "neg": operator.neg,
    "min": min,
    "max": max,
    "mul.lo": operator.mul,
    "mul.hi": lambda a, b: a * b >> 32,
    "mul.wide": operator.mul,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}

# Bits, as strings of them, the lowest first


def string(a: int, n: int) -> str:
    return f"{a & (1 << n) - 1:0{n}b}"[::-1]


def number(bits: str) -> int:
    return int(bits[::-1], 2)


def field(a: int, position: int, length: int, signed: bool) -> int:
    """Return a field of bits: beyond the 32 of ``a``, and above the field, there are copies of a sign or zeros."""
    position, length = position & 255, length & 255
    whole = string(a, 32)
    inside = whole[position : position + length][:32]
    sign = whole[min(position + length - 1, 31)] if signed and length else "0"
    return number((inside + 32 * sign)[:32])


def inserted(a: int, b: int, position: int, length: int) -> int:
    position, length = min(position & 255, 32), length & 255
    whole = string(b, 32)
    part = string(a, 32)[:length]
    return number((whole[:position] + part + whole[position + len(part) :])[:32])


def permuted(a: int, b: int, choice: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = []
    for i in range(4):
        nibble = choice >> 4 * i & 15
        byte = source[nibble & 7]
        result.append((255 if byte > 127 else 0) if nibble > 7 else byte)
    return int.from_bytes(bytes(result), "little")


# Floating-point numbers


def nearest(exact: Fraction, kind: str) -> float:
    """Return the number of type f32 or f64 nearest to a fraction, of two the even one."""
    if kind == "f64" or exact == 0:
        return float(exact)
    near = np.float32(float(exact))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    finite = [c for c in candidates if isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1))


def fused(a: float, b: float, c: float, kind: str) -> float:
    if all(map(isfinite, (a, b, c))):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if abs(exact) > Fraction(float(np.finfo(DTYPES[kind]).max)):
            return np.inf if exact > 0 else -np.inf
        if exact:
            return nearest(exact, kind)
    return c if isfinite(a) and isfinite(b) and not isfinite(c) else DTYPES[kind].type(a * b + c)


def with_sign(a: float) -> tuple[float, float]:
    """Return a key that puts -0 before 0."""
    return a, copysign(1, a)


def unless_nan(choose: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: b if isnan(a) else a if isnan(b) else choose(a, b)


def flushed(a: Number) -> Number:
    tiny = np.finfo(a.dtype).tiny
    return np.copysign(a.dtype.type(0), a) if abs(a) < tiny else a


def upper(a: float) -> float:
    """Return a float64 whose lower 32 bits are zero."""
    return (np.float64(a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


FLOATS: dict[str, Callable[..., Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "div.full": operator.truediv,
    "sqrt": np.sqrt,
    "sqrt.approx.ftz": lambda a: flushed(np.sqrt(flushed(a))),
    "rcp.approx.ftz": lambda a: flushed(upper(1 / flushed(upper(a)))),
    "neg": operator.neg,
    "abs": abs,
    "abs.ftz": lambda a: flushed(abs(a)),
    "min": unless_nan(partial(min, key=with_sign)),
    "max": unless_nan(partial(max, key=with_sign)),
    "max.NaN": lambda a, b: nan if isnan(a) or isnan(b) else max(a, b, key=with_sign),
}

ORDERS: dict[str, Callable[[Number, Number], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def compared(comparison: str, a: Number, b: Number) -> bool:
    """Return a comparison's result; one that ends in "u" holds for NaN, the others do not."""
    if isnan(a) or isnan(b):
        return comparison == "nan" or (comparison.endswith("u") and comparison != "u")
    if comparison in ("num", "nan"):
        return comparison == "num"
    return ORDERS[comparison[:2]](a, b)


def converted(values: "np.ndarray[Any, Any]", source: str, to: str) -> "np.ndarray[Any, Any]":
    """Return numbers in another type, by PyTorch where it is one of 16 bits."""
    torch_types = {"bf16": torch.bfloat16, "f16": torch.float16}
    if source in torch_types:
        return torch.from_numpy(values.view(np.int16)).view(torch_types[source]).float().numpy()
    if to in torch_types:
        return torch.from_numpy(values).to(torch_types[to]).view(torch.int16).numpy().view(np.uint16)
    return values.astype(DTYPES[to])
