"""The choice of a way, and the text of advice, from costs that are given."""

from typing import Any

import pytest

import gradkern as gk
from gradkern.advice.cost import Cost

P = 1_000_000


def cost(name: str, time: float | None, in_p: float | None, **fields: Any) -> Cost:
    memory = None if in_p is None else round(in_p * P)
    passes = {} if time is None else {"trunk": 3, "heads": 1, "time": time, "memory": memory}
    common: dict[str, Any] = {"arguments": {"through": name}, "needs_features": False, "is_exact": True}
    return Cost(name, **common | {"status": "measured"} | passes | fields)


def advice(*costs: Cost) -> gk.Advice:
    return gk.Advice(costs, "PCGrad()", 3, P, plain_seconds=0.0123, plain_passes=1)


def test_the_fastest_way_is_taken() -> None:
    found = advice(cost("a", 2.5, 0.1), cost("b", 2.0, 1.0), cost("c", None, None))
    assert found.best is found.rows[1]


def test_of_equally_fast_ways_that_with_the_least_memory_is_taken() -> None:
    found = advice(cost("a", 2.0, 1.0), cost("b", 2.09, 0.5), cost("c", 2.11, 0.0))
    assert found.best is found.rows[1]
    assert found.smallest is None  # it saves half of P and no more


def test_the_first_of_equal_ways_is_taken() -> None:
    found = advice(cost("a", 2.0, 1.0), cost("b", 1.99, 1.0))
    assert found.best is found.rows[0]


def test_an_approximation_is_never_taken() -> None:
    found = advice(cost("a", 2.0, 1.0), cost("b", 1.0, 0.0, is_exact=False))
    assert found.best is found.rows[0]
    assert found.smallest is None


def test_the_way_with_the_least_memory_is_told_if_that_matters() -> None:
    found = advice(cost("a", 2.0, 2.0), cost("b", 2.5, 0.25), cost("c", 3.0, 0.5))
    assert found.smallest is found.rows[1]
    assert str(found).splitlines()[-3:] == [
        'Take through="a": 2.00 times plain, +2.0 MB (+2.00 P).',
        'Least memory with the exact update: through="b": 2.50 times plain, +250.0 kB',
        "(+0.25 P).",
    ]


def test_without_a_way_none_is_taken() -> None:
    found = advice(cost("a", None, None, status="refused", notes=("out of memory",)))
    assert found.best is found.smallest is None


def test_the_text() -> None:
    kept = cost("activations, kept", 1.9, -0.01, arguments={"through": "activations", "finish": "kept"})
    found = advice(
        cost("rows", 2.53, 2.0),
        cost("batched", None, None, status="refused", notes=("needs features=h",)),
        kept,
        cost("streamed", 2.4, None, status="predicted", notes=("its last pass is predicted", "needs features=h")),
    )
    assert str(found) == (
        "3 tasks by PCGrad(); P = 1.0 MB, the parameters that train. Plain training takes\n"
        "12.3 ms for 1 backward pass. Peak memory and time are over plain's; trunk and\n"
        "heads are numbers of backward passes.\n"
        "\n"
        "way                  memory   in P  trunk  heads  time\n"
        "rows                +2.0 MB  +2.00      3      1  2.53  measured\n"
        "batched                   -      -      -      -     -  refused\n"
        "activations, kept  -10.0 kB  -0.01      3      1  1.90  measured\n"
        "streamed                  -      -      3      1  2.40  predicted\n"
        "\n"
        "batched; streamed: needs features=h.\n"
        "streamed: its last pass is predicted.\n"
        "\n"
        'Take through="activations", finish="kept": 1.90 times plain, -10.0 kB (-0.01 P).'
    )


@pytest.mark.parametrize("in_p", [0.0, 99.99, -999.0])
def test_it_fits_into_80_columns(in_p: float) -> None:
    names = ["rows, features=h, batched", "activations, kept, Sketch(64)"]
    costs = [cost(name, 123.45, in_p, notes=("a reason of many words " * 20,)) for name in names]
    costs.append(cost("features", None, None, status="refused"))
    costs.append(cost("activations", 12.34, in_p, status="predicted"))
    lines = str(gk.Advice(costs, "A(" + "b, " * 100 + ")", 40, P, 1234.5, 40)).splitlines()
    assert max(map(len, lines)) <= 80


def test_a_call_takes_its_arguments() -> None:
    sketch = gk.Sketch(64, seed=0)
    batched = cost("b", 2.0, 1.0, arguments={"through": "rows", "batched": True}, needs_features=True)
    assert batched.call == 'features=h, through="rows", batched=True'
    assert cost("s", 1.0, 0.0, arguments={"gramian": sketch}).call == "gramian=Sketch(columns=64, seed=0)"
