"""Wrong values of arguments, by kind of argument. Each list has the values that users are known to have passed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HUGE = 10**400
"""An integer that no float holds."""

Values = list[Any]


def flags() -> Values:
    """Return what is neither True nor False."""
    return [None, 0, 1, 0.5, "yes", "", b"1", [], [True], torch.tensor(True)]


def process_groups() -> Values:
    """Return what is neither a process group, None nor False."""
    return [True, 0, 1, "gloo", [], [0, 1], object(), torch.ones(2)]


def not_flags_or_none() -> Values:
    """Return what is neither True, False nor None."""
    return flags()[1:]


def strings() -> Values:
    """Return what is none of an argument's strings."""
    return [
        None,
        3,
        True,
        "",
        "no such word",
        b"sum",
        ["sum"],
        ("sum",),
        np.array(["sum"]),
        np.array(3),
        nn.Linear,
        len,
    ]


def strings_or_none() -> Values:
    """Return what is neither one of an argument's strings nor None."""
    return strings()[1:]


def numbers() -> Values:
    """Return what is no finite number."""
    nan, inf = float("nan"), float("inf")
    return [
        None,
        "0.5",
        b"1",
        "",
        [],
        [0.5],
        True,
        1j,
        nan,
        inf,
        -inf,
        HUGE,
        -HUGE,
        np.array([0.5, 0.5]),
        torch.ones(2),
        {},
    ]


def positive_numbers() -> Values:
    """Return what is no finite number above 0."""
    return [*numbers(), 0, -1, -0.5]


def shares() -> Values:
    """Return what is no number from 0 to 1."""
    return [*numbers(), -0.1, 1.1, 7]


def leaks() -> Values:
    """Return what is neither a number from 0 to 1 nor a sequence of such numbers."""
    nan, inf = float("nan"), float("inf")
    single = [None, "0.5", b"1", "", True, 1j, nan, inf, -inf, HUGE, {}, -0.1, 1.1, 7]
    return [*single, [], [1.1], [0.5, -0.1], [nan], ["0.5"], [None], [True], [[0.5]], torch.full((2,), 2.0)]


def integers(least: int = 1) -> Values:
    """Return what is no integer of at least ``least`` that fits into 64 bits."""
    nan, inf = float("nan"), float("inf")
    others = [None, "3", b"3", 2.0, 2.5, True, nan, inf, 1j, [], [3], torch.tensor(3.0), torch.ones(2), np.ones(2), {}]
    return [*others, least - 1, -7, HUGE, -HUGE]


def integers_or_none(least: int = 1) -> Values:
    """Return what is neither such an integer nor None."""
    return integers(least)[1:]


def generators() -> Values:
    """Return what is neither a torch.Generator nor None."""
    return [3, 0, True, "cpu", torch.Generator, np.random.default_rng(0), torch.device("cpu"), []]


def of_class(cls: type, none: bool) -> Values:
    """Return what is no object of a class, and not None if ``none`` is a right value."""
    return [*([] if none else [None]), 3, 0.5, True, "x", b"x", [], {}, torch.ones(2), cls, len]


def losses_of_matrix() -> Values:
    """Return what are no losses of a matrix of three rows."""
    return [None, 3, "x", [1.0] * 3, torch.ones(2), torch.ones(3).long()]


def second_batches() -> Values:
    """Return what are no second batch's gradients of three tasks."""
    return [None, 3, "x", torch.ones(3), torch.ones(2, 10), torch.ones(3, 10).long(), torch.ones(3, 10).half()]


def losses_after() -> Values:
    """Return what are no losses of three tasks after a step."""
    zero, integers = torch.tensor(0.0), torch.ones(3, dtype=torch.int64)
    entries = [[1.0, 1.0, "x"], [1.0, 1.0, True], [1.0, 0.0, 1.0], [1.0, zero, 1.0], [1.0, 1.0, -1.0]]
    return [None, 3, "abc", [1.0], {1.0, 2.0, 3.0}, torch.ones(2), torch.ones(3, 2), integers, *entries]


def matrices() -> Values:
    """Return what is no matrix (T, P) of floats with T >= 1."""
    J = torch.ones(3, 10)
    return [
        None,
        3,
        0.5,
        True,
        "J",
        [[1.0, 2.0]],
        np.ones((3, 10)),
        {},
        torch.ones(()),
        torch.ones(10),
        torch.ones(1, 3, 10),
        torch.ones(0, 10),
        J.bool(),
        J.to(torch.float8_e4m3fn),
        nn.Linear(2, 2),
    ]


def weights_of_matrix() -> Values:
    """Return what is no vector of weights for three rows of floats."""
    w = torch.ones(3)
    return [None, 3, "w", [1.0, 1.0, 1.0], np.ones(3), {}, w.long(), w.bool(), w + 0j, torch.ones(()), torch.ones(2)]


def offsets() -> Values:
    """Return what are no offsets of two segments of ten columns."""
    right = torch.tensor([0, 4, 10])
    wrong = [[0, 4, 9], [1, 4, 10], [0, 4, 11], [0, 11, 10], [-1, 4, 10]]
    others = [3, "x", [0, 4, 10], np.array([0, 4, 10]), torch.tensor([0]), torch.tensor([])]
    return [*others, right.int(), right.double(), right.view(1, 3), right.to("meta"), *map(torch.tensor, wrong)]


def gramians() -> Values:
    """Return what are no Gramians (..., T, T)."""
    M = torch.eye(3)
    sparse = [M.to_sparse(), M.to_sparse_csr()]
    return [
        None,
        3,
        "M",
        [[1.0]],
        np.eye(3),
        {},
        torch.ones(3),
        torch.ones(()),
        torch.ones(2, 3),
        M.long(),
        M.bool(),
        M + 0j,
        *sparse,
    ]


def outs(like: Tensor) -> Values:
    """Return what is no memory for a result like ``like``, other than None."""
    other = torch.empty(len(like) + 1)
    return [3, "out", [], np.zeros(len(like)), like.double(), like[:-1], other, like.view(1, -1), like.to_sparse()]


def orders() -> Values:
    """Return what is no order of three tasks, other than None."""
    return [
        3,
        "random",
        b"abc",
        True,
        {},
        [],
        [0, 0, 1],
        [0, 1, 3],
        [0.0, 1.0, 2.0],
        [True, False],
        [[0, 1, 2]],
        [[0, 1, 2], [0, 1]],
        [-1, 0, 1],
        torch.ones(3, 3, 3).long(),
        [None, 1],
        [HUGE, 0],
    ]


def task_weights() -> Values:
    """Return what are no weights of tasks."""
    nan, inf = float("nan"), float("inf")
    return [
        None,
        3,
        0.5,
        True,
        "12",
        b"12",
        {},
        {1.0, 2.0},
        [],
        ["1", "2"],
        [b"1"],
        [True, False],
        [None, 1.0],
        [1j, 1.0],
        [nan, 1.0],
        [inf, 1.0],
        [HUGE, 1.0],
        [[1.0, 2.0]],
        torch.ones(2, 2),
        torch.ones(()),
        torch.ones(2) + 0j,
        torch.ones(2).bool(),
        np.ones((2, 2)),
        np.array(["a", "b"]),
    ]


def preferences() -> Values:
    """Return what are no preferences of tasks, other than None."""
    return [*task_weights()[1:], [0.0, 0.0], [0], torch.zeros(3)]


def loaded_states() -> Values:
    """Return what is no state_dict of anything."""
    return [None, 3, 0.5, True, "state", b"x", [], [1], {}, {"x": 1}, {3: 4}, torch.ones(2), len]


def modules_or_tensors() -> Values:
    """Return what holds no parameters."""
    computed = torch.ones(2, requires_grad=True) * 2
    p = torch.ones(2, requires_grad=True)
    return [
        None,
        3,
        "params",
        b"params",
        [],
        {},
        [3],
        ["a"],
        [None],
        [p, None],
        [("a", p), p],
        [("a", 3)],
        [p, p],
        [computed],
        [torch.ones(2)],
        [torch.ones(2).long()],
        [torch.ones(2, 2).to_sparse_csr().requires_grad_()],
        [torch.ones(2, 2).to_sparse().requires_grad_()],
        [("a", p), ("a", torch.ones(2, requires_grad=True))],
        p,
        nn.Linear,
        nn.Sequential(),
    ]


def groupings() -> Values:
    """Return what divides no parameters into groups."""
    return [None, 3, True, "models", "", b"model", ["model"], {}, nn.Linear(2, 2).weight, lambda name: [name]]


def shortened(value: Any) -> str:
    """Return a name of a value for people."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.")
    text = (
        value.__name__ if isinstance(value, type) or (callable(value) and hasattr(value, "__name__")) else repr(value)
    )
    return text if len(text) < 24 else text[:20] + "..."
