"""Every instruction on numbers, on its edges and on random numbers, against ``closed_forms.py``."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.ptx import build, closed_forms
from tests.ptx.instructions import (
    BITS,
    COMPARISONS,
    CONVERSIONS,
    FLOAT_ARITHMETIC,
    INTEGER_ARITHMETIC,
    MOVES,
    Row,
    spellings,
)
from tests.ptx.snippets import DTYPES, Array, apply

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, of NaN and infinities

FLOAT_EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1 / 3,
    3e-45,
    -5e-324,
    1e-39,
    1e-310,
    65519.0,
    65520.0,
    3e38,
    1e308,
    np.inf,
    np.nan,
]


def opcodes(rows: Sequence[Row]) -> list[str]:
    """Return all opcodes of some rows."""
    return [opcode for row in rows for opcode in spellings(row)]


def samples(kind: str, rng: np.random.Generator) -> Array:
    """Return edges of a type and random numbers."""
    dtype = DTYPES[kind]
    if kind == "pred":
        return np.array([False, True])
    if kind in ("f32", "f64"):
        few = np.array([*FLOAT_EDGES, *rng.normal(size=5), *rng.normal(size=3) * 1e-5])
        return few.astype(dtype)
    n = 8 * dtype.itemsize
    edges = [0, 1, 2, 7, 31, 32, 33, n - 1, n, 255, (1 << n - 1) - 1, 1 << n - 1, (1 << n) - 1]
    few = [closed_forms.wrapped(edge, kind) for edge in edges]
    return np.array([*few, *np.frombuffer(rng.bytes(4 * dtype.itemsize), dtype)], dtype)


def tuples(kinds: Sequence[str]) -> list[Array]:
    """Return equally long arrays: all pairs and triples of the samples, or as many of them as are quick."""
    rng = np.random.default_rng(0)
    drawn = list(product(*(samples(kind, rng) for kind in kinds)))
    chosen = drawn if len(drawn) < 600 else [drawn[i] for i in rng.choice(len(drawn), 600, replace=False)]
    return [np.array(column, DTYPES[kind]) for column, kind in zip(zip(*chosen, strict=True), kinds, strict=True)]


def check(
    opcode: str,
    kinds: Sequence[str],
    result: str,
    function: Callable[..., Any],
    keep: Callable[..., bool] | None = None,
) -> None:
    """Compare an instruction with a function of one element of each input."""
    inputs = tuples(kinds)
    if keep is not None:
        kept = np.array([keep(*map(int, row)) for row in zip(*inputs, strict=True)])
        inputs = [column[kept] for column in inputs]
    found = apply(f"{opcode} %d, " + ", ".join(f"%x{i}" for i in range(len(kinds))), inputs, kinds, result)
    expected = np.array([function(*row) for row in zip(*inputs, strict=True)], DTYPES[result])
    np.testing.assert_array_equal(found, expected)
    if result in ("f32", "f64"):
        np.testing.assert_array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


def split(opcode: str) -> tuple[str, str]:
    """Return an opcode as operation and type."""
    operation, _, kind = opcode.replace(".rn", "").rpartition(".")
    return operation, kind


@pytest.mark.parametrize("opcode", opcodes(INTEGER_ARITHMETIC) + opcodes(BITS[:4]))
def test_integers(opcode: str) -> None:
    operation, kind = split(opcode)
    function = closed_forms.INTEGERS[operation]
    wide = f"{kind[0]}64"
    result = wide if operation.endswith("wide") else kind
    n = {"neg": 1, "not": 1, "mad.lo": 3, "mad.wide": 3}.get(operation, 2)
    kinds = [kind] * n
    if operation == "mad.wide":
        kinds[2] = wide
    keep = None
    if operation in ("div", "rem"):
        keep = lambda a, b: b != 0 and not (kind[0] == "s" and b == -1)  # noqa: E731
    check(opcode, kinds, result, lambda *xs: closed_forms.wrapped(function(*map(int, xs)), result), keep)


def shifted(opcode: str, a: int, n: int) -> int:
    return a << n if opcode.startswith("shl") else a >> n


FIELDS = {
    "bfe.u32": (4 - 1, partial(closed_forms.field, signed=False)),
    "bfe.s32": (4 - 1, partial(closed_forms.field, signed=True)),
    "bfi.b32": (4, closed_forms.inserted),
    "prmt.b32": (3, closed_forms.permuted),
    "popc.b32": (1, int.bit_count),
}


@pytest.mark.parametrize("opcode", opcodes(BITS[4:]))
def test_bits(opcode: str) -> None:
    kind = split(opcode)[1]
    if opcode[:2] == "sh":
        check(
            opcode,
            [kind, "u32"],
            kind,
            lambda a, n: closed_forms.wrapped(shifted(opcode, int(a), min(int(n), 64)), kind),
        )
    else:
        n, function = FIELDS[opcode]
        check(opcode, ["b32"] * n, "b32", lambda *xs: function(*map(int, xs)))


@pytest.mark.parametrize("opcode", opcodes(FLOAT_ARITHMETIC))
def test_floats(opcode: str) -> None:
    operation, kind = split(opcode)
    if operation == "fma":
        check(opcode, [kind] * 3, kind, partial(closed_forms.fused, kind=kind))
        return
    n = 1 if operation.split(".")[0] in ("sqrt", "rcp", "neg", "abs") else 2
    check(opcode, [kind] * n, kind, closed_forms.FLOATS[operation])


@pytest.mark.parametrize(
    "opcode", [o for o in opcodes(COMPARISONS) if "16" not in o or o.endswith(("b16", "u16", "s16"))]
)
def test_comparisons(opcode: str) -> None:
    _, comparison, kind = opcode.split(".")
    check(opcode, [kind, kind], "pred", partial(closed_forms.compared, comparison))


FLOATS_16 = np.array([0.0, -0.0, 1.0, -2.0, np.inf, -np.inf, np.nan, 1.0078125], np.float32)


@pytest.mark.parametrize("opcode", [o for o in opcodes(COMPARISONS) if "f16" in o])
def test_comparisons_of_16_bits(opcode: str) -> None:
    """Of one number, or of two: the low halves and the high ones."""
    _, comparison, kind = opcode.split(".")
    compare = closed_forms.ORDERS[comparison]
    low = np.array(list(product(FLOATS_16, FLOATS_16)), np.float32)
    high = low[::-1].copy()
    expected = [compare(a, b) for a, b in low.tolist()]
    low_bits, high_bits = (closed_forms.converted(x, "f32", kind.removesuffix("x2")).astype("u4") for x in (low, high))
    if kind.endswith("x2"):
        pairs = low_bits | high_bits << 16
        choice = "selp.b32 %l, 1, 0, %low; selp.b32 %h, 2, 0, %high; or.b32 %d, %l, %h"
        found = apply(f"{opcode} %low|%high, %x0, %x1; {choice}", list(pairs.T), ["b32", "b32"], "u32")
        assert found.tolist() == [a + 2 * compare(*b) for a, b in zip(expected, high.tolist(), strict=True)]
    else:
        assert apply(f"{opcode} %d, %x0, %x1", list(low_bits.T), ["b16", "b16"], "pred").tolist() == expected


@pytest.mark.parametrize("opcode", opcodes(CONVERSIONS))
def test_conversions(opcode: str) -> None:
    _, to, source = opcode.replace(".rn", "").split(".")
    values = samples(source, np.random.default_rng(1))
    if source in ("f16", "bf16"):
        values = np.arange(1 << 16, dtype="u2")
    if to in ("bf16x2", "f16x2"):
        found = apply(f"{opcode} %d, %x0, %x1", [values, values[::-1].copy()], [source] * 2, to)
        high, low = (closed_forms.converted(v, source, to[:-2]).astype("u4") for v in (values, values[::-1].copy()))
        same_bits(found >> 16, high, to[:-2])
        same_bits(found & 0xFFFF, low, to[:-2])
    else:
        found = apply(f"{opcode} %d, %x0", [values], [source], to)
        expected = closed_forms.converted(values, source, to)
        if to in ("f16", "bf16"):
            same_bits(found, expected, to)
        else:
            np.testing.assert_array_equal(found, expected)


def same_bits(found: Array, expected: Array, kind: str) -> None:
    """Compare 16-bit floats by their bits; NaN has many."""
    infinity = {"f16": 0x7C00, "bf16": 0x7F80}[kind]
    is_nan = (expected & 0x7FFF) > infinity
    assert ((found[is_nan] & 0x7FFF) > infinity).all()
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("opcode", opcodes(MOVES[:1]))
def test_moves(opcode: str) -> None:
    kind = split(opcode)[1]
    check(opcode, [kind], kind, lambda a: a)


@pytest.mark.parametrize("bits", [32, 64])
def test_halves_side_by_side(bits: int) -> None:
    """``mov.b32`` and ``mov.b64`` of a vector, either way."""
    half = f"b{bits // 2}"
    low, high = tuples([half, half])
    whole = low.astype(f"u{bits // 8}") | high.astype(f"u{bits // 8}") << bits // 2
    packed = apply(f"mov.b{bits} %d, {{ %x0, %x1 }}", [low, high], [half, half], f"b{bits}")
    np.testing.assert_array_equal(packed, whole)
    for template, expected in (("{%d, _}", low), ("{_, %d}", high)):
        np.testing.assert_array_equal(apply(f"mov.b{bits} {template}, %x0", [whole], [f"b{bits}"], half), expected)


@pytest.mark.parametrize("opcode", [o for o in opcodes(MOVES) if o.startswith("selp")])
def test_choices(opcode: str) -> None:
    kind = split(opcode)[1]
    inputs = tuples([kind, kind, "pred"])
    found = apply(f"{opcode} %d, %x0, %x1, %x2", inputs, [kind, kind, "pred"], kind)
    np.testing.assert_array_equal(found, np.where(inputs[2], inputs[0], inputs[1]))
