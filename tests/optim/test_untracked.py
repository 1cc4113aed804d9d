"""The warning of parameters that losses reach and the optimizer lacks."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradkern as gk
from gradkern.compat.pcgrad import PCGrad
from tests.models import MultiHead, problem

MESSAGE = r"the losses reach 6 parameter\(s\) that require grad and are not in the optimizer"
KINDS: list[type[Optimizer]] = [torch.optim.SGD, gk.optim.AdamW]
each_kind = pytest.mark.parametrize("kind", KINDS)
both_forms = pytest.mark.parametrize("as_callables", [False, True])


def trunk_alone(kind: type[Optimizer], **options: Any) -> tuple[gk.SurgeryOptimizer, MultiHead, Tensor, Tensor]:
    """Return an optimizer that lacks the six parameters of the heads, their model, inputs and targets."""
    model, x, y = problem()
    return gk.SurgeryOptimizer(kind(model.trunk.parameters(), lr=0.1), gk.GradVac(), **options), model, x, y


def losses_of(model: MultiHead, x: Tensor, y: Tensor, as_callables: bool) -> list[Any]:
    return [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)


@each_kind
@both_forms
@pytest.mark.parametrize("way", ["backward", "update", "step"])
def test_one_warning_points_at_the_users_line(way: str, as_callables: bool, kind: type[Optimizer]) -> None:
    opt, model, x, y = trunk_alone(kind)
    losses = losses_of(model, x, y, as_callables)
    ways: dict[str, Callable[[], Any]] = {
        "backward": lambda: opt.backward(losses),
        "update": lambda: opt.update(losses),
        "step": lambda: opt.step(lambda: opt.backward(losses).losses.sum()),
    }
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        ways[way]()
    (warning,) = caught
    assert warning.filename == __file__
    assert f'"{way}": lambda: opt.' in Path(__file__).read_text().splitlines()[warning.lineno - 1]
    assert "requires_grad_(False)" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(losses_of(model, x, y, as_callables))
        opt.update(losses_of(model, x, y, as_callables))
    assert all(p.grad is None for p in model.heads.parameters())


@each_kind
@both_forms
@pytest.mark.parametrize("way", ["backward", "update"])
def test_as_an_error_it_leaves_everything_as_it_was(way: str, as_callables: bool, kind: type[Optimizer]) -> None:
    opt, model, x, y = trunk_alone(
        kind, memory=True, suppression=gk.Suppression(0.3, seed=1), conflict_lr=gk.ConflictLR()
    )
    values = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MESSAGE):
            getattr(opt, way)(losses_of(model, x, y, as_callables))
    assert all(p.grad is None and torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    surgery = opt.state_dict()["surgery"]
    assert surgery["memory"] == []
    assert surgery["suppression"]["step"] == 0
    assert opt.aggregator.targets is None
    assert opt._pending.step_scale is None
    assert not opt.state


@each_kind
@both_forms
def test_an_input_that_requires_grad_deserves_none(as_callables: bool, kind: type[Optimizer]) -> None:
    """As those of physics-informed networks do, and actions that go through a critic, computed or leaves."""
    model, x, y = problem()
    points, scale = x.requires_grad_(), torch.ones((), requires_grad=True)
    action = torch.nn.functional.linear(points, torch.eye(6)) * scale
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), gk.PCGrad())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = losses_of(model, points, y, as_callables)
        opt.backward(losses)
        fresh = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), gk.PCGrad())
        fresh.update(losses_of(model, action, y, as_callables))
    assert points.grad is None
    assert scale.grad is None


def test_parameters_of_a_part_that_is_frozen_or_tracked_deserve_none() -> None:
    opt, model, x, y = trunk_alone(torch.optim.SGD)
    model.heads.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(model.losses(x, y))


def test_a_step_that_fails_before_it_does_not_use_it_up() -> None:
    opt, model, x, y = trunk_alone(torch.optim.SGD)

    def fails() -> Tensor:
        raise ArithmeticError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ArithmeticError):
            opt.backward([*losses_of(model, x, y, True)[:2], fails])
    with pytest.warns(UserWarning, match=MESSAGE):
        opt.backward(losses_of(model, x, y, True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_remembers_that_it_has_come(copied: Callable[[Any], Any]) -> None:
    opt, model, x, y = trunk_alone(torch.optim.SGD)
    with pytest.warns(UserWarning, match=MESSAGE):
        opt.backward(model.losses(x, y))
    model, opt = copied((model, opt))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.backward(model.losses(x, y))


def test_within_accumulate_and_through_another_interface() -> None:
    opt, model, x, y = trunk_alone(torch.optim.SGD)
    with opt.accumulate(), pytest.warns(UserWarning, match=MESSAGE) as caught:
        opt.backward(model.losses(x, y))
    drop_in = PCGrad(torch.optim.SGD(model.trunk.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=MESSAGE) as caught_there:
        drop_in.pc_backward(model.losses(x, y))
    assert caught[0].filename == caught_there[0].filename == __file__


def test_parameters_that_a_lazy_module_has_created_count() -> None:
    trunk = nn.Linear(3, 3)
    head = nn.LazyLinear(1)
    head(torch.ones(1, 3))
    opt = gk.SurgeryOptimizer(torch.optim.SGD(trunk.parameters(), lr=0.1), gk.PCGrad())
    h = trunk(torch.ones(2, 3))
    with pytest.warns(UserWarning, match=r"2 parameter\(s\).* Shapes: (\(1, 3\), \(1,\)|\(1,\), \(1, 3\))"):
        opt.backward([head(h).sum(), h.sum()])
