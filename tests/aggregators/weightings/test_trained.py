"""Uncertainty and IMTL-L: one backward pass gives the model and the method what autograd gives for their objective."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.aggregators.weightings.trained import Trained
from tests.models import problem
from tests.tolerances import assert_near

OBJECTIVES: dict[str, tuple[type[Trained], Callable[[Tensor, Tensor], Tensor]]] = {
    "uncertainty": (gk.Uncertainty, lambda L, s: (L * torch.exp(-s) / 2 + s / 2).sum()),
    "imtl-l": (gk.IMTLL, lambda L, s: (s.exp() * L - s).sum()),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)
NEAR = 3e-6  # float32; a few roundings of sums of 16 terms
START = [0.3, -0.7, 1.1]


def made(name: str, start: Sequence[float] = START) -> tuple[Trained, Tensor]:
    method = OBJECTIVES[name][0](len(start))
    (s,) = method.parameters()
    with torch.no_grad():
        s.copy_(torch.tensor(start))
    return method, s


def assert_grads(params: Sequence[Tensor], expected: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            assert p.grad is not None
            assert_near(p.grad, g, g.abs().max(), NEAR)


def expected_grads(name: str, s: Tensor, losses: Sequence[Tensor], params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    objective = OBJECTIVES[name][1](torch.stack(list(losses)), s)
    return torch.autograd.grad(objective, [*params, s], allow_unused=True)


@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("report", [False, True])
@each_objective
def test_gradients_are_those_of_the_objective(name: str, report: bool, as_callables: bool) -> None:
    model, x, y = problem()
    method, s = made(name)
    method.report = report
    params = list(model.parameters())
    expected = expected_grads(name, s, model.losses(x, y), params)
    losses: Any = [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)
    info = gk.backward(losses, [*params, s], aggregator=method)
    assert_grads([*params, s], expected)
    assert (info.gramian is None) == (not report)


@each_objective
def test_an_absent_task_trains_nothing(name: str) -> None:
    model, x, y = problem()
    method, s = made(name)
    params = list(model.parameters())
    expected = expected_grads(name, s[::2], model.losses(x, y)[::2], params)[:-1]
    info = gk.backward([model.losses(x, y)[0], None, model.losses(x, y)[2]], [*params, s], aggregator=method)
    assert_grads(params, expected)
    assert s.grad is not None
    assert s.grad[1] == 0
    assert info.weights[1] == 0


@each_objective
def test_micro_batches_are_one_step_of_their_sums(name: str) -> None:
    model, x, y = problem()
    method, s = made(name)
    params = [*model.parameters(), s]
    expected = expected_grads(name, s, [2 * loss for loss in model.losses(x, y)], params[:-1])
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), method)
    with opt.accumulate():
        opt.backward(model.losses(x, y))
        opt.backward(model.losses(x, y))
    assert_grads(params, expected)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, gk.optim.AdamW])
@each_objective
def test_training_as_torch_trains_the_objective(name: str, kind: Any) -> None:
    model, x, y = problem()
    twin, _, _ = problem()
    (method, s), (_, twin_s) = made(name), made(name)
    opt = gk.SurgeryOptimizer(kind([*model.parameters(), s], lr=0.01), method)
    plain = torch.optim.AdamW([*twin.parameters(), twin_s], lr=0.01)
    for _ in range(5):
        opt.update(model.losses(x, y))
        plain.zero_grad()
        OBJECTIVES[name][1](torch.stack(twin.losses(x, y)), twin_s).backward()
        plain.step()
    assert_near(s.detach(), twin_s.detach(), 1.0, 1e-5)  # Adam's steps of 0.01 amplify roundings of small gradients


@each_objective
def test_suppression_and_the_fused_step_train_it_too(name: str) -> None:
    model, x, y = problem()
    method, s = made(name)
    losses = model.losses(x, y)
    (expected,) = torch.autograd.grad(OBJECTIVES[name][1](torch.stack(losses).detach(), s), s)
    opt = gk.SurgeryOptimizer(
        gk.optim.AdamW([*model.parameters(), s], lr=0.01), method, suppression=gk.Suppression(0.5, seed=0)
    )
    opt.backward(losses)
    assert_grads([s], [expected])
    before = s.detach().clone()
    opt.zero_grad()
    opt.update(model.losses(x, y))
    assert bool((s.detach() != before).all())


@each_objective
def test_an_optimizer_that_lacks_it_is_told_once(name: str) -> None:
    model, x, y = problem()
    method, s = made(name)
    with pytest.warns(UserWarning, match=r"nothing trains the parameters of .*\(T=3\)") as found:
        gk.backward(model.losses(x, y), model, aggregator=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.backward(model.losses(x, y), model, aggregator=method)
    assert found[0].filename == __file__
    assert s.grad is None


@each_objective
def test_another_number_of_tasks(name: str) -> None:
    model, x, y = problem()
    method, s = made(name, [0.0, 0.0])
    with pytest.raises(ValueError, match=r"T is 2 in .*, but the step has 3 tasks"):
        gk.backward(model.losses(x, y), [*model.parameters(), s], aggregator=method)
    assert all(p.grad is None for p in [*model.parameters(), s])


def test_the_optimum_of_s_is_the_closed_form() -> None:
    losses = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    for name, optimum in (("uncertainty", losses.log()), ("imtl-l", -losses.log())):
        method, s = made(name, optimum.tolist())
        own = method.solution(torch.eye(3).double(), None, losses).own
        assert own[0][0] is s
        assert own[0][1].abs().max() < 1e-6  # s is float32
    assert math.isclose(gk.Uncertainty(1).weights(torch.eye(1), torch.ones(1)).item(), 0.5)
