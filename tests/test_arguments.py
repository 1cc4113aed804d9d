"""The checkers of argument values: what each returns, and the error for everything else."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from gradkern import arguments as a

HUGE = 10**400
LONG = 10**5000
"""Python refuses to write so many digits."""

RETURNED: list[tuple[Callable[[], Any], Any]] = [
    (lambda: a.integer("n", 3, 1), 3),
    (lambda: a.integer("n", np.int32(3), 1, 3), 3),
    (lambda: a.integer("n", 2**64 - 1, 0, 2**64 - 1), 2**64 - 1),
    (lambda: a.number("x", 1, least=0, most=1), 1.0),
    (lambda: a.number("x", np.float64(0.5), above=0, below=1), 0.5),
    (lambda: a.number("x", Fraction(1, 4)), 0.25),
    (lambda: a.number("x", math.inf, above=0, infinite=True), math.inf),
    (lambda: a.numbers("w", [1, 2.5]), [1.0, 2.5]),
    (lambda: a.numbers("w", np.array([1, 2], dtype=np.int8)), [1.0, 2.0]),
    (lambda: a.numbers("w", torch.tensor([0.5, -1.0], requires_grad=True)), [0.5, -1.0]),
    (lambda: a.numbers("w", [torch.tensor(2.0), np.float32(0.5)]), [2.0, 0.5]),
    (lambda: a.boolean("flag", False), False),
    (lambda: a.choice("mode", "b", ("a", "b")), "b"),
    (lambda: a.choice("mode", None, (None, "b")), None),
    (lambda: a.instance("s", "x", str, "a string"), "x"),
    (lambda: a.sequence("s", (1, 2), "a sequence of things"), (1, 2)),
    (lambda: a.mapping("s", {"b": 1, "a": 2}, ("a", "b")), {"a": 2, "b": 1}),
]


@pytest.mark.parametrize(("call", "expected"), RETURNED)
def test_a_right_value_is_returned(call: Callable[[], Any], expected: Any) -> None:
    returned = call()
    assert returned == expected
    assert type(returned) is type(expected)


def test_a_tensor_is_returned_itself() -> None:
    X = torch.ones(2)
    assert a.tensor("X", X, (torch.float32,)) is X
    assert a.tensor("X", X) is X


RAISED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: a.integer("n", True), TypeError, "n must be an integer, got True"),
    (lambda: a.integer("n", 1.0), TypeError, "n must be an integer, got 1.0"),
    (lambda: a.integer("n", "1"), TypeError, "n must be an integer, got '1'"),
    (lambda: a.integer("n", None), TypeError, "n must be an integer, got None"),
    (lambda: a.integer("n", torch.tensor(1)), TypeError, "n must be an integer, got tensor(1)"),
    (lambda: a.integer("n", 0, 1), ValueError, "n must be an integer from 1 to 2**63 - 1, got 0"),
    (lambda: a.integer("n", 8, 1, 7), ValueError, "n must be an integer from 1 to 7, got 8"),
    (lambda: a.integer("n", -(2**63) - 1), ValueError, "n must be an integer from -2**63 to 2**63 - 1, got -92233"),
    (lambda: a.integer("n", 2**31, 0, 2**30), ValueError, "n must be an integer from 0 to 2**30, got 2147483648"),
    (lambda: a.integer("n", HUGE), ValueError, "got 1" + 198 * "0" + "…"),
    (lambda: a.integer("n", LONG), ValueError, f"got an integer of {LONG.bit_length()} bits"),
    (lambda: a.number("x", True), TypeError, "x must be a number, got True"),
    (lambda: a.number("x", "0.5"), TypeError, "x must be a number, got '0.5'"),
    (lambda: a.number("x", 1j), TypeError, "x must be a number, got 1j"),
    (lambda: a.number("x", torch.tensor(1.0)), TypeError, "x must be a number, got tensor(1.)"),
    (lambda: a.number("x", math.nan), ValueError, "x must be a number that is finite, got nan"),
    (
        lambda: a.number("x", math.nan, infinite=True, above=0),
        ValueError,
        "x must be a number that is above 0 and not NaN, got nan",
    ),
    (lambda: a.number("x", math.inf), ValueError, "x must be a number that is finite, got inf"),
    (lambda: a.number("x", -math.inf, least=0, infinite=True), ValueError, "that is at least 0 and not NaN, got -inf"),
    (lambda: a.number("x", math.inf, below=1, infinite=True), ValueError, "that is below 1 and not NaN, got inf"),
    (
        lambda: a.number("x", HUGE, infinite=True, above=0),
        ValueError,
        "that is above 0 and not NaN, got 1000",
    ),
    (lambda: a.number("x", LONG), ValueError, "x must be a number that is finite, got an integer of"),
    (lambda: a.number("x", 0, above=0), ValueError, "x must be a number that is above 0 and finite, got 0"),
    (
        lambda: a.number("x", 1.0, least=0, below=1),
        ValueError,
        "must be a number that is at least 0 and below 1, got 1.0",
    ),
    (lambda: a.number("x", 2, most=1), ValueError, "x must be a number that is at most 1 and finite, got 2"),
    (lambda: a.numbers("w", "12"), TypeError, "w must be a sequence of numbers, got '12'"),
    (lambda: a.numbers("w", b"12"), TypeError, "w must be a sequence of numbers, got b'12'"),
    (lambda: a.numbers("w", {1.0, 2.0}), TypeError, "w must be a sequence of numbers, got {1.0, 2.0}"),
    (lambda: a.numbers("w", {1.0: 2.0}), TypeError, "w must be a sequence of numbers, got {1.0: 2.0}"),
    (lambda: a.numbers("w", 3), TypeError, "w must be a sequence of numbers, got 3"),
    (lambda: a.numbers("w", torch.tensor(3.0)), TypeError, "w must be a sequence of numbers, got tensor(3.)"),
    (
        lambda: a.numbers("w", torch.ones(2, device="meta")),
        TypeError,
        "w must be a sequence of numbers, got tensor(...",
    ),
    (lambda: a.numbers("w", torch.ones(2).to_sparse()), TypeError, "w must be a sequence of numbers, got tensor(ind"),
    (lambda: a.numbers("w", torch.ones(2, 2)), TypeError, "w[0] must be a number, got [1.0, 1.0]"),
    (lambda: a.numbers("w", torch.tensor([True])), TypeError, "w[0] must be a number, got True"),
    (lambda: a.numbers("w", [1.0, False]), TypeError, "w[1] must be a number, got False"),
    (lambda: a.numbers("w", ["1"]), TypeError, "w[0] must be a number, got '1'"),
    (lambda: a.numbers("w", [1.0, math.inf]), ValueError, "w[1] must be a number that is finite, got inf"),
    (lambda: a.numbers("w", []), ValueError, "w must hold a number at least, got []"),
    (lambda: a.boolean("flag", 1), TypeError, "flag must be True or False, got 1"),
    (lambda: a.boolean("flag", "False"), TypeError, "flag must be True or False, got 'False'"),
    (lambda: a.choice("mode", np.array(["a", "b"]), ("a", "b")), TypeError, "mode must be 'a' or 'b', got array(["),
    (lambda: a.choice("mode", None, ("a", "b")), TypeError, "mode must be 'a' or 'b', got None"),
    (lambda: a.choice("mode", "A", (None, "a", "b")), ValueError, "mode must be None, 'a' or 'b', got 'A'"),
    (lambda: a.tensor("X", [1.0]), TypeError, "X must be a tensor, got [1.0]"),
    (lambda: a.tensor("X", torch.eye(2).to_sparse_csr()), TypeError, "one that is torch.sparse_csr: pass X.to_dense()"),
    (lambda: a.tensor("X", torch.ones(2), (torch.float64,)), TypeError, "X must be float64, got torch.float32"),
    (
        lambda: a.tensor("X", torch.ones(2).int(), (torch.float32, torch.float64)),
        TypeError,
        "X must be float32 or float64, got torch.int32",
    ),
    (lambda: a.instance("s", 1, str, "a string or None"), TypeError, "s must be a string or None, got 1"),
    (lambda: a.sequence("s", "ab", "a sequence of things"), TypeError, "s must be a sequence of things, got 'ab'"),
    (lambda: a.sequence("s", {1}, "a sequence of things"), TypeError, "s must be a sequence of things, got {1}"),
    (lambda: a.mapping("s", None, ("a", "b")), TypeError, "s must hold 'a' and 'b', got None"),
    (lambda: a.mapping("s", {"a": 1, "c": 2}, ("a", "b")), ValueError, "s must hold 'a' and 'b', got ['a', 'c']"),
]


@pytest.mark.parametrize(("call", "error", "message"), RAISED)
def test_a_wrong_value_raises_an_error_that_names_it(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert len(str(raised.value)) < a.LONGEST + 100


@pytest.mark.parametrize("layout", ["coo", "csr", "nested"])
def test_a_tensor_that_is_not_dense_is_refused_by_its_kind(layout: str) -> None:
    X = torch.eye(2)
    given = {"coo": X.to_sparse, "csr": X.to_sparse_csr, "nested": lambda: torch.nested.nested_tensor([X, X])}[layout]()
    with pytest.raises(TypeError, match=r"X must be a dense tensor, got .*(sparse|nested)"):
        a.tensor("X", given)
