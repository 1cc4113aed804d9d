"""Steps in inference mode, and a ``.grad`` that was made there or cannot be written for another reason."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from tests.models import MultiHead, problem

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "sum": lambda: gk.Sum([1.0, 2.0, 3.0]),
    "pcgrad": lambda: gk.PCGrad(order=[0, 1, 2]),
    "gradvac": lambda: gk.GradVac(order=[0, 1, 2]),
}
each_method = pytest.mark.parametrize("method", METHODS)


def losses_of(model: MultiHead, x: Tensor, y: Tensor, as_callables: bool) -> list[Any]:
    return [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("as_callables", [False, True])
@each_method
def test_a_backward_pass_in_inference_mode_is_one_like_others(method: str, as_callables: bool) -> None:
    """A later one outside adds to its ``.grad``."""
    results = []
    for inside in (False, True):
        model, x, y = problem()
        made = METHODS[method]()
        for first in (True, False):
            losses = losses_of(model, x, y, as_callables)
            with torch.inference_mode(inside and first):
                info = gk.backward(losses, model, aggregator=made)
            assert info.weights.isfinite().all()
            results.append(gradients(model))
    assert same(results[0], results[2])
    assert same(results[1], results[3])
    assert same(results[1], [2 * g for g in results[0]]) or method == "gradvac"  # whose targets have moved


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, gk.optim.AdamW])
@each_method
def test_updates_and_sums_in_inference_mode_are_like_others(method: str, kind: Any) -> None:
    """State that they make there, such as moments, can be changed outside."""
    results = []
    for inside in (False, True):
        model, x, y = problem()
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.01, **options), METHODS[method](), memory=True)
        for first in (True, False):
            losses = model.losses(x, y)
            with torch.inference_mode(inside and first):
                opt.update(losses)
            with opt.accumulate():
                for batch in (model.losses(x, y), model.losses(x, y)):
                    with torch.inference_mode(inside and first):
                        opt.backward(batch)
            opt.step()
            opt.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(*results)


def made_in_inference_mode(p: Tensor) -> None:
    with torch.inference_mode():
        p.grad = torch.ones_like(p)


def of_another_shape(p: Tensor) -> None:
    """Give a ``.grad`` of the shape that ``p`` had then."""
    now = p.data
    p.data = torch.ones(5)
    p.grad = torch.ones(5)
    p.data = now


def expanded(p: Tensor) -> None:
    p.grad = torch.ones(1).expand_as(p)


UNWRITABLE: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "made in inference mode": (made_in_inference_mode, "it was made in inference mode; set it to None"),
    "of another shape": (of_another_shape, r"it is \(5,\) on cpu, the parameter \(2,\) on cpu"),
    "expanded": (expanded, r"strides \(0,\)"),
}


@pytest.mark.parametrize("before", [None, 3.0])
@pytest.mark.parametrize("kind", UNWRITABLE)
@each_method
def test_what_cannot_be_written_raises_before_anything_is(method: str, kind: str, before: float | None) -> None:
    """The last of three parameters is the one that cannot; the first and the method's targets are as before."""
    give, reason = UNWRITABLE[kind]
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    for one in (p, q):
        one.grad = None if before is None else torch.full((2,), before)
    aggregator = METHODS[method]()
    wrapper = gk.SurgeryOptimizer(torch.optim.SGD([p, q, r], lr=1.0), aggregator)
    give(r)
    bad = r.grad
    message = rf"\.grad of params\[2\] in params cannot be added to in place: {reason}"

    def losses() -> list[Tensor]:
        return [(p * q * r).sum(), p.sum() - r.sum(), -q.sum() + r.sum()]

    for step in (partial(gk.backward, params=[p, q, r], aggregator=aggregator), wrapper.backward, wrapper.update):
        with pytest.raises(ValueError, match=message):
            step(losses())
    for one in (p, q):
        assert one.grad is None if before is None else torch.equal(one.grad, torch.full((2,), before))
    assert all(torch.equal(one.detach(), torch.ones(2)) for one in (p, q, r))
    assert r.grad is bad
    assert getattr(aggregator, "targets", None) is None


def test_a_grad_made_in_inference_mode_can_be_replaced_by_its_clone() -> None:
    p = nn.Parameter(torch.zeros(2))
    made_in_inference_mode(p)
    p.grad = p.grad.clone()
    gk.backward([2 * p.sum(), p.sum()], [p], aggregator=gk.PCGrad())
    assert torch.equal(p.grad, torch.full((2,), 4.0))
