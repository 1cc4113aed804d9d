"""DWA, RLW, FAMO and GradNorm: weights that move by rules of their own."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.models import problem
from tests.tolerances import assert_near

F64 = torch.float64
NEAR = 1e-12  # float64, a few roundings of T numbers
MAKE: dict[str, Callable[[], gk.Aggregator]] = {
    "dwa": gk.DWA,
    "stch": lambda: gk.STCH(warmup=5),
    "famo": lambda: gk.FAMO(3),
    "gradnorm": lambda: gk.GradNorm(3),
}
each_method = pytest.mark.parametrize("name", MAKE)


def random_losses(steps: int = 9) -> Tensor:
    return torch.rand(steps, 3, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5


@pytest.mark.parametrize("every", [1, 3])
def test_dwa_over_many_steps(every: int) -> None:
    losses, J = random_losses(), torch.eye(3, dtype=F64)
    dwa = gk.DWA(temperature=0.5, every=every)
    expected = reference.dwa([list(J)] * 9, losses.tolist(), 0.5, every)
    for row, update in zip(losses, expected, strict=True):
        assert_near(dwa(J, losses=row), update, 1.0, NEAR)


def test_dwa_is_libmtls_formula() -> None:
    dwa, M = gk.DWA(), torch.eye(2, dtype=F64)
    for losses in ([1.0, 1.0], [0.5, 1.0]):
        assert dwa.weights(M, torch.tensor(losses)).tolist() == [1.0, 1.0]
    expected = 2 * torch.softmax(torch.tensor([0.5, 1.0], dtype=F64) / 2, 0)
    assert_near(dwa.weights(M, torch.ones(2)), expected, 1.0, NEAR)


def test_gradnorm_over_many_steps() -> None:
    losses = random_losses()
    J = torch.randn(3, 10, generator=torch.Generator().manual_seed(1), dtype=F64)
    method = gk.GradNorm(3)
    expected = reference.gradnorm([list(J)] * 9, 3, losses.tolist())
    for row, update in zip(losses, expected, strict=True):
        assert_near(method(J, losses=row), update, J.abs().sum(0).max(), 1e-10)  # steps accumulate roundings
    assert method.table is not None
    assert_near(method.table[0].sum(), torch.tensor(3.0), 3.0, NEAR)


def test_gradnorm_makes_lengths_equal_without_alpha() -> None:
    M = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=F64))
    method = gk.GradNorm(3, alpha=0, lr=1e-3)
    for _ in range(3000):
        w = method.weights(M, torch.ones(3))
    lengths = w * M.diagonal().sqrt()
    assert_near(lengths, lengths.mean().expand(3), lengths.mean(), 0.02)  # it turns within steps of 1e-3


def test_famo_moves_its_logits_as_torchs_adam() -> None:
    losses = random_losses(12)
    method = gk.FAMO(3, lr=0.1, decay=0.01)
    w = torch.zeros(3, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.1, weight_decay=0.01)
    for before, after in zip(losses[::2], losses[1::2], strict=True):
        found = method.weights(torch.eye(3, dtype=F64), before)
        assert_near(found, torch.tensor(reference.famo_weights(w.tolist(), before.tolist()), dtype=F64), 1.0, NEAR)
        method.after(list(after))
        fall = (before + 1e-8).log() - (after + 1e-8).log()
        (w.grad,) = torch.autograd.grad(torch.softmax(w, 0), w, fall)
        adam.step()
        assert method.table is not None
        assert_near(method.table[0], w.detach(), 1.0, NEAR)


def test_famo_leaves_out_absent_tasks_after_the_step() -> None:
    method, M = gk.FAMO(3), torch.eye(3, dtype=F64)
    method.after([1.0, 1.0, 1.0])  # there is no step yet
    assert method.table is not None
    assert torch.equal(method.table[:4], torch.zeros(4, 3, dtype=F64))
    method.weights(M, torch.ones(3))
    method.after([0.5, None, torch.tensor([2.0])])
    logits = method.table[0]
    assert logits[1] == 0
    assert logits[0] < 0 < logits[2]  # the first fell, the last grew


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0], r"losses must hold 3 entries, one for each task, got 1: \[1.0\]"),
        (torch.ones(2), r"losses must have shape \(3,\), a number for each task, got shape \(2,\)"),
        (torch.ones(3, 2), r"losses must have shape \(3,\), a number for each task, got shape \(3, 2\)"),
        (np.ones((1, 3)), r"losses must have shape \(3,\), a number for each task, got shape \(1, 3\)"),
        (torch.tensor(1.0), r"losses must have shape \(3,\), a number for each task, got shape \(\)"),
        ([1.0, torch.ones(2), 1.0], r"losses\[1\] must have one element, got shape \(2,\)"),
    ],
)
def test_famo_names_the_shape_of_losses_that_do_not_fit(losses: Any, message: str) -> None:
    method = gk.FAMO(3)
    method.weights(torch.eye(3), torch.ones(3))
    before = method.table.clone()
    with pytest.raises(ValueError, match=message):
        method.after(losses)
    assert torch.equal(method.table, before)


def test_famo_trains_two_losses_of_far_scales_alike() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    method = gk.FAMO(2)
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.05), method, shared=[p])
    for _ in range(50):
        opt.update([1000 * p[0].square(), p[1].square()])
        method.after([1000 * p[0].detach().square(), p[1].detach().square()])
    assert p[1] < 0.9


def test_rlw_draws_from_its_generator() -> None:
    model, x, y = problem()
    method = gk.RLW(torch.Generator().manual_seed(7))
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=F64)
    info = gk.backward(model.losses(x, y), model, aggregator=method)
    assert torch.equal(info.weights, torch.softmax(drawn, 0).float())
    info = gk.backward([model.losses(x, y)[0], None, None], model, aggregator=method)
    assert info.weights.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("way", ["tensors", "callables", "suppressed"])
@each_method
def test_a_step_that_raises_puts_the_state_back(name: str, way: str) -> None:
    model, x, y = problem()
    method = MAKE[name]()
    suppression = gk.Suppression(0.5, seed=0) if way == "suppressed" else None

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("out of memory")

    opt = gk.SurgeryOptimizer(Broken(model.parameters(), lr=0.1), method, suppression=suppression)
    as_callables = way == "callables"

    def losses() -> Any:
        return [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)

    opt.backward(losses())
    opt.zero_grad()
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.update(losses())
    assert before.keys() == method.state_dict().keys()
    assert torch.equal(method.state_dict()["table"].nan_to_num(), before["table"].nan_to_num())
    opt.backward(losses())
    assert not torch.equal(method.state_dict()["table"].nan_to_num(), before["table"].nan_to_num()) or name == "famo"


@each_method
def test_the_state_stays_float64_and_is_loaded_bit_for_bit(name: str) -> None:
    losses, J = random_losses(), torch.randn(3, 8, dtype=F64)
    method = MAKE[name]()
    for row in losses[:4]:
        method(J, losses=row)
    method.half()
    new: Any = MAKE[name]()
    new.load_state_dict(method.state_dict())
    for row in losses[4:]:
        assert torch.equal(method(J, losses=row), new(J, losses=row))
    assert new.table.dtype == F64
    before = new.table.clone()
    with pytest.raises(ValueError, match="table in state_dict must be of shape"):
        new.load_state_dict({**new.state_dict(), "table": torch.ones(1, 3)})
    assert torch.equal(new.table.nan_to_num(), before.nan_to_num())


@each_method
def test_another_number_of_tasks(name: str) -> None:
    method = MAKE[name]()
    method(torch.eye(3), losses=torch.ones(3))
    with pytest.raises(ValueError, match=r"3 .*the step has 2"):
        method(torch.eye(2), losses=torch.ones(2))


@each_method
def test_an_overflow_leaves_the_state_alone(name: str) -> None:
    method: Any = MAKE[name]()
    J = torch.eye(3, dtype=F64)
    method(J, losses=torch.ones(3))
    before = method.table.clone()
    method(J, losses=torch.tensor([1.0, torch.inf, 1.0]))
    if name == "gradnorm":
        method.weights(J / 0, torch.ones(3))
    assert torch.equal(method.table.nan_to_num(), before.nan_to_num())
