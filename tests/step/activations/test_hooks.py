"""Hooks in a step through activations: those of plain training run in the last pass, and its own are gone after it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.step.activations.structures import layers
from tests.step.activations.truth import FINISHES, NEAR, Mixed, check_grads, check_step, truth
from tests.step.activations.uses import loss_of
from tests.tolerances import assert_near

pytestmark = [
    pytest.mark.usefixtures("float64_by_default"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # at the first layer, whose input is data
]
T = 3


class Model(nn.Module):
    """A trunk of two layers, with three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = layers(4, 5, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(T))
        self.x = torch.randn(6, 4)

    def losses(self) -> list[Tensor]:
        h = self.trunk(self.x)
        return [loss_of(head(h), t) for t, head in enumerate(self.heads)]


def step(model: nn.Module, losses: list[Tensor], finish: str = "backward", **more: Any) -> Tensor:
    """Take a step, and return its weights."""
    return gk.backward(losses, model, aggregator=Mixed(), through="activations", finish=finish, **more).weights


def weighted(model: Model, w: Tensor) -> Tensor:
    """Return a loss whose gradient is the step's over the trunk: that of Σ w_i L_i."""
    return sum(w[t] * loss for t, loss in enumerate(model.losses()))


def test_a_hook_after_the_gradient_runs_once_and_sees_it() -> None:
    model = Model()
    seen: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone()))
    step(model, model.losses())
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        (grad,) = seen[name]
        assert torch.equal(grad, p.grad)


def test_a_hook_after_the_gradient_may_take_it() -> None:
    """As optimizers that step within the backward pass do, to keep one gradient at a time."""
    model, alone = Model(), Model()

    def take(p: Tensor) -> None:
        p.data.sub_(p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(take)
    expected = truth(alone.losses(), list(alone.parameters()), Mixed().weights)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, model.losses())
    for p, start, g in zip(model.parameters(), before, expected.grads, strict=True):
        assert p.grad is None
        assert_near((start - p.detach()).flatten(), g, expected.scale, NEAR)


def test_hooks_of_modules_see_the_weighted_gradient_last() -> None:
    model, alone = Model(), Model()
    calls: dict[int, list[Tensor]] = {0: [], 2: []}
    plain: dict[int, list[Tensor]] = {0: [], 2: []}
    for m, noted in ((model, calls), (alone, plain)):
        for k, found in noted.items():
            m.trunk[k].register_full_backward_hook(lambda _, __, out, found=found: found.append(out[0].clone()))
    w = step(model, model.losses())
    weighted(alone, w).backward()
    for k, found in calls.items():
        assert len(found) <= T + 1
        (expected,) = plain[k]
        assert_near(found[-1], expected, expected.abs().max(), NEAR)


def test_pre_hooks_of_modules_see_the_weighted_gradient_last() -> None:
    model, alone = Model(), Model()
    calls: list[Tensor] = []
    plain: list[Tensor] = []
    for m, noted in ((model, calls), (alone, plain)):
        m.trunk[2].register_full_backward_pre_hook(lambda _, out, noted=noted: noted.append(out[0].clone()))
    w = step(model, model.losses())
    weighted(alone, w).backward()
    assert_near(calls[-1], plain[0], plain[0].abs().max(), NEAR)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"scales": lambda g: 3 * g, "cuts": lambda g: g.clamp(-0.05, 0.05)}


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finish", FINISHES)
def test_a_module_hook_that_changes_gradients_changes_them_for_each_task(finish: str, change: str, layer: int) -> None:
    """As it does to the rows. The update is what the hook makes of the weighted gradient."""
    model, change_of = Model(), CHANGES[change]
    model.trunk[layer].register_full_backward_hook(
        lambda _, grads, __: tuple([None if g is None else change_of(g) for g in grads])
    )
    losses = model.losses()
    expected = truth(losses, list(model.parameters()), Mixed().weights)
    info = gk.backward(losses, model, aggregator=Mixed(), through="activations", finish=finish)
    assert_near(info.gramian, expected.gramian, expected.gramian.diagonal().max(), NEAR)
    if change == "scales":
        check_grads(list(model.parameters()), expected)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("finish", FINISHES)
def test_a_hook_on_what_comes_out_of_a_layer(finish: str, layer: int) -> None:
    """A gradient reversal, for example."""
    model = Model()
    h = model.trunk[: layer + 1](model.x)
    h.register_hook(lambda g: -2 * g)
    h = model.trunk[layer + 1 :](h)
    check_step([loss_of(head(h), t) for t, head in enumerate(model.heads)], list(model.parameters()), finish)


@pytest.mark.parametrize("finish", FINISHES)
def test_its_own_hooks_are_gone_afterwards(finish: str) -> None:
    model = Model()
    losses = model.losses()
    params = list(model.parameters())
    before = torch.autograd.grad(sum(losses), params, retain_graph=True)
    step(model, losses, finish, retain_graph=True)
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    expected = truth(losses, params, Mixed().weights)
    model.zero_grad()
    step(model, losses, finish)  # and a second step is that of the first
    for p, g in zip(params, expected.grads, strict=True):
        assert_near(p.grad.flatten(), g, expected.scale, NEAR)


class Broken(Exception):
    """What a hook raises."""


@pytest.mark.parametrize("finish", FINISHES)
def test_its_own_hooks_are_gone_if_a_pass_fails(finish: str) -> None:
    model, method = Model(), gk.GradVac()
    losses, params = model.losses(), list(model.parameters())
    before = torch.autograd.grad(sum(losses), params, retain_graph=True)
    state = copy.deepcopy(method.state_dict())

    def fail(*_: Any) -> None:
        raise Broken

    handle = model.trunk[0].register_full_backward_hook(fail)
    hooked = model.losses()
    with pytest.raises(Broken):
        gk.backward(hooked, model, aggregator=method, through="activations", finish=finish)
    handle.remove()
    assert all(p.grad is None for p in params)
    assert method.state_dict().keys() == state.keys()
    again = model.losses()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(sum(again), params), before, strict=True))
    check_step(model.losses(), params, finish)


@pytest.mark.parametrize("finish", FINISHES)
def test_what_a_hook_raises_once_ends_the_step(finish: str) -> None:
    """A pass is not run again in the hope that it does not raise."""
    model, calls = Model(), []
    h = model.trunk[:1](model.x)

    def fail_at_first(g: Tensor) -> None:
        calls.append(g)
        if len(calls) == 1:
            raise Broken

    h.register_hook(fail_at_first)
    losses = [loss_of(head(model.trunk[1:](h)), t) for t, head in enumerate(model.heads)]
    with pytest.raises(Broken):
        step(model, losses, finish)
    assert len(calls) == 1
    assert all(p.grad is None for p in model.parameters())
