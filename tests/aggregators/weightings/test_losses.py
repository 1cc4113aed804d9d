"""GeometricMean, STCH and the losses that methods depend on: gradients of the objective, absent tasks, bad losses."""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from tests.models import problem
from tests.tolerances import assert_near

NEAR = 1e-5  # float32 gradients, which also cancel
MAKE: dict[str, Callable[[], gk.Aggregator]] = {
    "geometric-mean": gk.GeometricMean,
    "stch": gk.STCH,
    "famo": lambda: gk.FAMO(3),
}
OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "geometric-mean": lambda L: L.prod() ** (1 / len(L)),
    "stch": lambda L: L.log().sum(),
    "famo": lambda L: L.log().sum() / (1 / L.detach()).sum(),
}
each_method = pytest.mark.parametrize("name", MAKE)


def grads_of(objective: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(objective, params))


@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("report", [False, True])
@each_method
def test_one_backward_pass_gives_the_gradient_of_the_objective(name: str, report: bool, as_callables: bool) -> None:
    model, x, y = problem()
    params = list(model.parameters())
    expected = grads_of(OBJECTIVES[name](torch.stack(model.losses(x, y))), params)
    method: Any = MAKE[name]()
    method.report = report
    losses: Any = [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)
    info = gk.backward(losses, model, aggregator=method)
    for p, g in zip(params, expected, strict=True):
        assert_near(p.grad, g, g.abs().max(), NEAR)
    assert (info.gramian is None) == (not report)


@pytest.mark.parametrize("suppressed", [False, True])
@each_method
def test_absent_tasks_are_left_out(name: str, suppressed: bool) -> None:
    """With suppression of next to nothing the step takes the way over rows."""
    model, x, y = problem()
    params = [*model.trunk.parameters()]
    expected = grads_of(OBJECTIVES[name](torch.stack(model.losses(x, y)[::2])), params)
    a, _, c = model.losses(x, y)
    suppression = gk.Suppression(1e-9, seed=0) if suppressed else None
    info = gk.backward([a, None, c], model, aggregator=MAKE[name](), suppression=suppression)
    for p, g in zip(params, expected, strict=True):
        assert_near(p.grad, g, g.abs().max(), NEAR)
    assert info.weights[1] == 0


@pytest.mark.parametrize("loss", [0.0, -1.0])
@each_method
def test_a_loss_without_logarithm_changes_nothing(name: str, loss: float) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    method = MAKE[name]()
    gk.backward(list(p.unbind()), [p], aggregator=method, shared=[p])
    before, grad = copy.deepcopy(method.state_dict()), p.grad.clone()
    with pytest.raises(ValueError, match=rf"losses\[1\] must be above 0, because .*; got {loss}"):
        gk.backward([p[0], p[1] - 1 + loss, p[2]], [p], aggregator=method, shared=[p])
    assert torch.equal(p.grad, grad)
    for key, x in method.state_dict().items():
        assert x is before[key] is None or torch.equal(x.nan_to_num(), before[key].nan_to_num())


@each_method
def test_a_loss_that_is_not_finite_shows_and_moves_no_state(name: str) -> None:
    method = MAKE[name]()
    M = torch.eye(3)
    method.weights(M, torch.tensor([1.0, 2.0, 3.0]))
    before = {key: x if x is None else x.clone() for key, x in method.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        w = method.weights(M, torch.tensor([1.0, bad, 3.0]))
        assert not (w * torch.tensor([1.0, bad, 3.0])).isfinite().all()
    for key, x in method.state_dict().items():
        assert x is before[key] is None or torch.equal(x.nan_to_num(), before[key].nan_to_num())


@each_method
def test_missing_losses(name: str) -> None:
    with pytest.raises(ValueError, match=r"losses must be given with .*, got None"):
        MAKE[name]()(torch.eye(3))


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_stch_is_a_smooth_maximum_after_the_warmup(mu: float) -> None:
    stch, M = gk.STCH(mu, warmup=2), torch.eye(3, dtype=torch.float64)
    first = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 1.0]], dtype=torch.float64)
    for row in first:
        assert_near(stch.weights(M, row), 1 / row, 1.0, 1e-12)
    L = torch.tensor([1.5, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(3 * mu * torch.logsumexp((L / first.mean(0)).log() / mu, 0), L)
    for _ in range(2):  # the nadir stays
        assert_near(stch.weights(M, L.detach()), expected, 1.0, 1e-12)


def test_a_small_mu_sees_only_the_worst_task() -> None:
    stch, M = gk.STCH(1e-3, warmup=1), torch.eye(2)
    stch.weights(M, torch.tensor([1.0, 1.0]))
    assert stch.weights(M, torch.tensor([0.5, 0.6])).tolist() == pytest.approx([0, 2 / 0.6])


def test_only_one_graph_is_alive_unless_all_losses_are_needed() -> None:
    """A callable's graph holds its activations, which nothing else does."""

    def alive(method: gk.Aggregator) -> int:
        p = torch.nn.Parameter(torch.ones(4))
        graphs: list[Any] = []
        most = 0

        def loss() -> Tensor:
            nonlocal most
            most = max(most, sum(g() is not None for g in graphs) + 1)
            h = p * 2
            graphs.append(weakref.ref(h))
            result = h.square().sum()
            result.grad_fn.metadata["h"] = h
            return result

        gk.backward([loss] * 3, [p], aggregator=method, shared=[p])
        return most

    at_once = {"dwa": gk.DWA(), "rlw": gk.RLW(), "report": gk.Sum(report=True), "sum": gk.Sum(), "norm": gk.GradNorm(3)}
    assert {name: alive(method) for name, method in at_once.items()} == dict.fromkeys(at_once, 1)
    assert {name: alive(make()) for name, make in MAKE.items()} == dict.fromkeys(MAKE, 3)
