"""report=True: norms, cosines and conflicts without surgery, and the update is torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradkern as gk
from tests.models import flat, problem, task_gradients
from tests.tolerances import assert_near

FIXED: dict[str, Callable[..., gk.Aggregator]] = {
    "sum": gk.Sum,
    "weighted": lambda **more: gk.Sum([1.0, 0.4307, 1.6094], **more),
    "mean": gk.Mean,
    "constant": lambda **more: gk.Constant([0.5, 0.0, -2.0], **more),
}
each_fixed = pytest.mark.parametrize("name", FIXED)


@pytest.mark.parametrize("groups", ["model", "parameter"])
@each_fixed
def test_the_update_is_torchs_own_bit_for_bit(name: str, groups: Any, device: torch.device) -> None:
    model, x, y = problem(device=device)
    plain = gk.backward(model.losses(x, y), model, aggregator=FIXED[name]())
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    info = gk.backward(model.losses(x, y), model, aggregator=FIXED[name](report=True), groups=groups)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert torch.equal(info.losses, plain.losses)
    assert_near(info.weights.reshape(-1, 3)[0], plain.weights, 1.0, 1e-6)


def test_the_report_is_of_the_shared_gradients() -> None:
    model, x, y = problem()
    params = list(model.trunk.parameters())
    J = torch.stack([flat(row, params) for row in task_gradients(model.losses(x, y), params)])
    info = gk.backward(model.losses(x, y), model, aggregator=gk.Sum(report=True))
    M = J @ J.T
    assert_near(info.gramian, M, M.diagonal().max(), 3e-6)
    assert info.norms is not None
    assert info.conflicts is not None
    assert_near(info.norms, J.norm(dim=1), J.norm(), 3e-6)
    assert torch.equal(info.conflicts, M < 0)
    assert "conflict" in info.scalars()


@pytest.mark.parametrize("retain_graph", [False, True])
def test_graphs_are_kept_only_on_request(retain_graph: bool) -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    gk.backward(losses, model, aggregator=gk.Sum(report=True), retain_graph=retain_graph)
    if retain_graph:
        sum(losses).backward()
    else:
        with pytest.raises(RuntimeError, match="second time"):
            sum(losses).backward()


@pytest.mark.parametrize("way", ["callables", "features", "features and callables", "micro-batches", "update"])
def test_every_way_tells_conflicts_and_gives_the_sum(way: str) -> None:
    model, x, y = problem()
    sum(model.losses(x, y)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), gk.Sum(report=True))
    before = [p.detach().clone() for p in model.parameters()]
    if way == "callables":
        info = opt.backward([lambda t=t: model.loss(t, x, y) for t in range(3)])
    elif way == "update":
        info = opt.update(model.losses(x, y))
        for p, b, g in zip(model.parameters(), before, expected, strict=True):
            assert_near(b - p.detach(), g, b.abs().max() + g.abs().max(), 3e-6)
    elif way == "micro-batches":
        with opt.accumulate() as total:
            opt.backward(model.losses(x, y))
        info = total.info
    else:
        h = model.trunk(x)
        heads: Any = [lambda t=t: (model.heads[t](h).squeeze(-1) - y[t]).square().mean() for t in range(3)]
        info = opt.backward(heads if "callables" in way else [head() for head in heads], features=h)
    assert info.conflicts is not None
    if way != "update":
        for p, g in zip(model.parameters(), expected, strict=True):
            assert_near(p.grad, g, g.abs().max(), 3e-6)


def test_repr_tells_it() -> None:
    assert repr(gk.Sum(report=True)) == "Sum(weights=None, report=True)"
    assert repr(gk.Mean(report=True)) == "Mean(report=True)"
