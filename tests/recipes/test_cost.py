"""Tests of the recipes' measurement of a step's cost: what is measured, in which order, and what is printed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.models import flat, problem, task_gradients
from tests.recipes.test_recipes import grads, recipe
from tests.tolerances import TOLERANCES, assert_near

cost, pinn, rl = recipe("cost"), recipe("pinn"), recipe("multitask_rl")


def callables(model: nn.Module, x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
    return [lambda t=t: model.loss(t, x, y) for t in range(3)]


def test_the_plain_sum_and_the_usual_loop_compute_what_they_say(
    float64_by_default: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = iter([2, 0, 1] for _ in range(3))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(next(order)))
    model, x, y = problem()
    params = list(model.parameters())
    rows = [flat(row, params) for row in task_gradients(model.losses(x, y), params)]
    scale = sum(row.norm() for row in rows)
    opt = gk.SurgeryOptimizer(torch.optim.Adam(model.parameters()), gk.PCGrad())
    cost.plain_sum(opt, callables(model, x, y))
    assert_near(grads(model), sum(rows), scale, TOLERANCES[torch.float64])
    opt.zero_grad()
    cost.usual_pcgrad(opt, callables(model, x, y))
    modified = reference.pcgrad(rows, [[2, 0, 1]] * 3)
    assert (sum(modified) - sum(rows)).norm() > 1e-3 * scale  # some tasks conflict
    assert_near(grads(model), sum(modified), scale, TOLERANCES[torch.float64])
    assert next(order, None) is None


def test_the_ways_take_turns_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 3)
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    steps, threads = [], torch.get_num_threads()
    names = {backward: name for name, backward in cost.WAYS.items()}
    torch.set_num_threads(2)
    try:
        seconds = cost.measure(lambda backward: lambda: steps.append((names[backward], torch.get_num_threads())))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert steps == (1 + 3) * [("sum", 1), ("usual", 1), ("gradkern", 1)]
    assert {name: len(times) for name, times in seconds.items()} == {"sum": 3, "usual": 3, "gradkern": 3}
    assert all(t > 0 for times in seconds.values() for t in times)


def test_the_ratios_are_medians_of_each_rounds_own() -> None:
    told = cost.report({"sum": [1.0, 2.0, 10.0], "usual": [10.0, 3.0, 4.0], "gradkern": [1.2, 6.0, 5.0]})
    # 10, 1.5, 0.4 and 1.2, 3, 0.5 and 8.33, 0.5, 0.8
    assert "takes 2000.00 ms; with PCGrad as usually written 1.50 times as long, with gradkern 1.20 times" in told
    assert "usual / gradkern 0.80" in told


@pytest.mark.filterwarnings("ignore:the losses reach")  # as in test_pinn.py
@pytest.mark.parametrize("module", [pinn, rl], ids=["pinn", "multitask_rl"])
def test_a_recipe_prints_its_cost(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    monkeypatch.setattr(rl, "MT10", rl.SMALL)
    module.cost()
    assert capsys.readouterr().out.startswith("a step with the plain sum takes ")
