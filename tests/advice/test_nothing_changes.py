"""Advice changes nothing: a step after it is, bit for bit, the step without it."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from tests.arguments.call import copied
from tests.models import MultiHead, problem

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "draws from the default generator": lambda: gk.PCGrad(partner="all", order=None),
    "draws from a generator": lambda: gk.RLW(generator=torch.Generator().manual_seed(1)),
    "state": gk.GradVac,
    "a network": gk.GradAttention,
    "entrywise": gk.GradDrop,
    "means of rows": gk.MoCo,
    "weighs losses": gk.Sum,
    "weighs losses and reports": lambda: gk.Sum(report=True),
    "losses in its state": gk.DWA,
    "trained": lambda: gk.Uncertainty(3),
}


class Run:
    """A model, its losses on one batch, and an optimizer; two runs of the same arguments are equal."""

    def __init__(self, make_method: Callable[[], gk.Aggregator], **options: Any) -> None:
        self.model, self.x, self.y = problem()
        method = make_method()  # its seed or its network is drawn after problem() has seeded the generator
        self.opt = gk.SurgeryOptimizer(
            torch.optim.SGD([*self.model.parameters(), *method.parameters()], lr=0.1), method, **options
        )
        self.opt.backward(self.losses()[0])  # so that method, masks and memory have a state
        self.opt.step()

    def losses(self) -> tuple[list[Tensor], Tensor]:
        h = self.model.trunk(self.x)
        heads = zip(self.model.heads, self.y, strict=True)
        return [(head(h).squeeze(-1) - y).square().mean() for head, y in heads], h

    def state(self) -> Any:
        params = self.opt._tensors()
        grads = [p.grad for p in params]
        return copied([*params, *grads, self.opt.state_dict(), self.opt._pending.step_scale, torch.get_rng_state()])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or bool(a == b)


def check(make: Callable[[], Run], features: bool = True, absent: int | None = None) -> gk.Advice:
    """Take two steps after advice, and two without; return the advice."""
    found = []
    for is_advised in (False, True):
        run = make()
        for _ in range(2):
            losses, h = run.losses()
            given: list[Any] = [None if t == absent else loss for t, loss in enumerate(losses)]
            if is_advised:
                before = run.state()
                advice = run.opt.advise(given, features=h if features else None)
                assert same(before, run.state())
            run.opt.backward(given)
            found.append(run.state())
    assert same(found[:2], found[2:])
    return advice


@pytest.mark.parametrize("name", METHODS)
def test_a_step_after_advice_is_the_step_without_it(name: str) -> None:
    check(lambda: Run(METHODS[name]))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": True},
        {"suppression": gk.Suppression(0.5, seed=3)},
        {"suppression": gk.Suppression(0.5, scope="all", seed=3)},
        {"conflict_lr": gk.ConflictLR()},
        {"groups": "parameter"},
    ],
    ids=lambda options: "-".join(options),
)
def test_modifiers_stay_as_they_are(options: dict[str, Any]) -> None:
    def make() -> Run:
        suppression = options.get("suppression")
        if suppression is not None:
            suppression.load_state_dict({"seed": 3, "step": 0})
        return Run(gk.PCGrad, **options)

    check(make, absent=1)


def test_the_sketch_of_an_optimizer_keeps_its_position() -> None:
    run = Run(gk.PCGrad, through="activations", gramian=gk.Sketch(8, seed=1))
    before = run.opt.state_dict()["surgery"]
    losses, h = run.losses()
    run.opt.advise(losses, features=h)
    assert run.opt.state_dict()["surgery"] == before


def test_gradients_that_are_missing_stay_missing() -> None:
    model, x, y = problem()
    gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_gradients_do_not_run() -> None:
    model, x, y = problem()
    seen: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert not seen


def test_losses_and_features_can_be_used_afterwards() -> None:
    model, x, y = problem()
    h = model.trunk(x)
    losses = [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]
    expected = torch.autograd.grad(sum(losses), list(model.parameters()), retain_graph=True)
    gk.advise(losses, model, aggregator=gk.PCGrad(), features=h)
    assert not h._backward_hooks
    sum(losses).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("frame", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_is_the_same_in_every_mode(frame: Callable[[], Any]) -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    with frame():
        advice = gk.advise(losses, model, aggregator=gk.PCGrad())
    assert advice.rows[0].status == "measured"


def test_a_warning_comes_with_the_step_and_not_with_advice() -> None:
    model, x, y = problem(n_tasks=1)
    method = gk.PCGrad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.advise(model.losses(x, y), model, aggregator=method)
    with pytest.warns(UserWarning, match="no surgery with one task"):
        gk.backward(model.losses(x, y), model, aggregator=method)


def test_parameters_may_come_from_an_iterator() -> None:
    model, x, y = problem()
    shared = model.trunk.parameters()
    advice = gk.advise(model.losses(x, y), model.parameters(), aggregator=gk.PCGrad(), shared=shared)
    assert advice.parameter_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_dropout_in_callables_draws_the_same_afterwards() -> None:
    def run(is_advised: bool) -> list[Tensor | None]:
        model: MultiHead
        model, x, y = problem()

        def loss(t: int) -> Tensor:
            h = torch.nn.functional.dropout(model.trunk(x))
            return (model.heads[t](h).squeeze(-1) - y[t]).square().mean()

        losses = [lambda t=t: loss(t) for t in range(3)]
        if is_advised:
            gk.advise(losses, model, aggregator=gk.PCGrad())
        gk.backward(losses, model, aggregator=gk.PCGrad())
        return [p.grad for p in model.parameters()]

    assert same(run(False), run(True))
