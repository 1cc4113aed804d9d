"""``shared=``: the parameters under surgery, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern import reference
from tests.models import flat, problem, task_gradients
from tests.tolerances import assert_near

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": gk.PCGrad,
    "gradvac": gk.GradVac,
    "sum": gk.Sum,
    "constant": lambda: gk.Constant([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("shared", [[], (), iter(()), nn.ReLU(), {}.values()], ids=lambda shared: type(shared).__name__)
@pytest.mark.parametrize("method", METHODS)
def test_shared_must_not_be_empty(method: str, shared: Any) -> None:
    model, x, y = problem()
    made = METHODS[method]()
    with pytest.raises(ValueError, match=r"^shared is empty: .* gives no parameter, such as a filter by name"):
        gk.backward(model.losses(x, y), model, aggregator=made, shared=shared)
    with pytest.raises(ValueError, match=r"^shared is empty"):
        gk.SurgeryOptimizer(torch.optim.SGD(model.parameters()), made, shared=shared)
    assert all(p.grad is None for p in model.parameters())


def test_an_iterator_that_one_step_has_used_up_is_no_set_of_shared_parameters() -> None:
    model, x, y = problem()
    trunk = model.trunk.parameters()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), shared=trunk)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^shared is empty: <generator .*an iterator that was used before"):
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), shared=trunk)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_an_optimizer_keeps_what_an_iterator_held() -> None:
    model, x, y = problem()
    inner, order = torch.optim.SGD(model.parameters()), [0, 1, 2]
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=order), shared=model.trunk.parameters())
    trunk = list(model.trunk.parameters())
    rows = [flat(row, trunk) for row in task_gradients(model.losses(x, y), trunk)]
    expected = reference.pcgrad_update(rows, [order] * 3)
    for times in (1, 2):
        opt.backward(model.losses(x, y))
        got = flat([p.grad for p in trunk], trunk)
        assert_near(got, times * expected, times * expected.norm(), 1e-5)  # float32
