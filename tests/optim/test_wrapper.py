"""What a SurgeryOptimizer passes on to the optimizer inside, what it copies, and what it takes inside and adds."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.compat.amp import GradVacAMP, PCGradAMP
from gradkern.compat.pcgrad import PCGrad
from tests.models import problem

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
each_copy = pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pair(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[tuple[Any, Any, Callable[[], Any]]]:
    """Return a wrapped optimizer and a bare one beside ``gk.backward``, each with its model and its backward pass."""
    (model, x, y), (other, _, _) = problem(), problem()
    wrapped, bare = gk.SurgeryOptimizer(make(model), gk.PCGrad(order=ORDER)), make(other)
    return [
        (wrapped, model, lambda: wrapped.backward(model.losses(x, y))),
        (bare, other, lambda: gk.backward(other.losses(x, y), other, aggregator=gk.PCGrad(order=ORDER))),
    ]


def test_a_schedule_free_optimizer_trains_and_evaluates() -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    results = []
    for opt, model, backward in pair(lambda m: peers.ScheduleFreeSGD(m.parameters(), lr=0.1)):
        seen = []
        for _ in range(3):
            opt.train()
            opt.zero_grad()
            backward()
            opt.step()
            seen += values(model)
            opt.eval()
            seen += values(model)
        results.append(seen)
        assert opt.base_lrs == [0.1]
    assert same(*results)
    assert not same(results[0][-10:], results[0][-20:-10])  # eval has moved the weights to their averages


def test_the_two_steps_of_sam() -> None:
    peers = pytest.importorskip("pytorch_optimizer")
    results = []
    for opt, model, backward in pair(lambda m: peers.SAM(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)):
        for _ in range(3):
            backward()
            opt.first_step(zero_grad=True)
            backward()
            opt.second_step(zero_grad=True)
        results.append(values(model))
    assert same(*results)
    assert not same(results[0], values(problem()[0]))


def test_only_public_attributes_that_the_wrapper_lacks_are_passed_on() -> None:
    class Own(torch.optim.SGD):
        rate_of_decay = 0.25
        groups = "not those of the surgery"
        _private = 1

    inner = Own(problem()[0].parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad())
    assert opt.rate_of_decay == 0.25
    assert opt.groups == "model"
    for name in ("_private", "__len__", "__iter__", "first_step", "no_such_name"):
        assert not hasattr(opt, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = opt.no_such_name
    opt.rate_of_decay = 0.5
    assert inner.rate_of_decay == 0.25
    assert copy.deepcopy(opt).optimizer.rate_of_decay == 0.25
    unmade = gk.SurgeryOptimizer.__new__(gk.SurgeryOptimizer)
    assert not hasattr(unmade, "anything")
    assert not hasattr(unmade, "optimizer")


def test_an_optimizer_that_does_surgery_already_is_refused() -> None:
    model, _, _ = problem()
    inner = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.GradVac())
    message = "optimizer must not do surgery itself, got SurgeryOptimizer: give the optimizer within"
    with pytest.raises(TypeError, match=message):
        gk.SurgeryOptimizer(inner, gk.PCGrad())
    with pytest.raises(TypeError, match=message):
        PCGrad(inner)
    with pytest.raises(TypeError, match=message):
        PCGradAMP(3, inner)
    with pytest.raises(TypeError, match=message):
        GradVacAMP(3, inner, "cpu")
    gk.SurgeryOptimizer(inner.optimizer, gk.PCGrad())


@each_copy
@pytest.mark.parametrize("mode", ["attenuate", "amplify"])
def test_a_copy_between_backward_and_step_scales_its_step(mode: str, copied: Callable[[Any], Any]) -> None:
    """``.grad`` is no part of copies of parameters, so the test gives the copies theirs."""
    model, x, y = problem()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR(mode))
    info = opt.backward(model.losses(x, y))
    assert info.step_scale is not None
    assert info.step_scale != 1
    other, copy_of_opt = copied((model, opt))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    for one in (opt, copy_of_opt):
        one.step()
    assert same(values(other), values(model))
    for p, before in zip(model.parameters(), values(problem()[0]), strict=True):
        # Some roundings of 6e-8 on numbers below 4.
        assert torch.allclose(p.detach(), before - 0.1 * info.step_scale * p.grad, rtol=0, atol=1e-6)


@each_copy
def test_no_copy_is_made_of_half_a_sum(copied: Callable[[Any], Any]) -> None:
    model, x, y = problem()
    for opt in (
        gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad()),
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        with opt.accumulate():
            opt.backward(model.losses(x, y))
            with pytest.raises(RuntimeError, match=r"a copy within accumulate\(\)"):
                copied(opt)
        copied(opt)


def added(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), model.heads[0].weight]


GROUPS: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: {}, ValueError, r"param_group must hold 'params', got \[\]"),
    (lambda m: None, TypeError, "param_group must be a dictionary that holds 'params', got None"),
    (lambda m: added(m), TypeError, "param_group must be a dictionary"),
    (lambda m: {"lr": 0.1}, ValueError, r"param_group must hold 'params', got \['lr'\]"),
    (lambda m: {"params": None}, TypeError, r"param_group\['params'\] must be tensors .* got None"),
    (lambda m: {"params": "weight"}, TypeError, r"param_group\['params'\] must be tensors .* got 'weight'"),
    (lambda m: {"params": set(added(m))}, TypeError, r"param_group\['params'\] must be tensors"),
    (lambda m: {"params": [added(m)[0], 3]}, TypeError, r"param_group\['params'\]\[1\] must be a tensor"),
    (lambda m: {"params": [added(m)[0]] * 2}, ValueError, r"param_group\['params'\] holds a tensor twice"),
    (lambda m: {"params": [added(m)[0] * 2]}, ValueError, r"param_group\['params'\] must be leaf tensors"),
    (
        lambda m: {"params": nn.Parameter(torch.ones(2, device="meta"))},
        ValueError,
        r"param_group does not go with .*one device; params\[10\] is on meta, others on cpu",
    ),
    (lambda m: {"params": [added(m)[1]]}, ValueError, "param_group does not go with .* the same tensor twice"),
]


@pytest.mark.parametrize("kind", [torch.optim.SGD, gk.optim.AdamW])
@pytest.mark.parametrize(("group", "error", "message"), GROUPS)
def test_a_group_that_does_not_fit_is_named_and_not_added(
    group: Callable[[nn.Module], Any], error: type[Exception], message: str, kind: Any
) -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(kind(model.parameters(), lr=0.1), gk.PCGrad(order=ORDER))
    with pytest.raises(error, match=message):
        opt.add_param_group(group(model))
    assert len(opt.param_groups) == 1
    opt.update(model.losses(x, y))


def test_a_group_that_fits_is_added_with_its_options() -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.trunk.parameters(), lr=0.1), gk.PCGrad(order=ORDER))
    group: dict[str, Any] = {"params": (p for p in model.heads.parameters()), "lr": 0.0}
    opt.add_param_group(group)
    assert opt.param_groups[1] is group  # as in torch: later changes of the dictionary are changes of the group
    before = values(model.heads)
    opt.update(model.losses(x, y))
    assert same(values(model.heads), before)
    assert not same(values(model.trunk), values(problem()[0].trunk))
    opt.add_param_group({"params": nn.Parameter(torch.ones(2))})
    opt.add_param_group({"params": []})  # as the weights without decay of a model that has none
    assert [len(group["params"]) for group in opt.param_groups[2:]] == [1, 0]
    opt.update(model.losses(x, y))


def test_a_complex_parameter_may_be_added() -> None:
    model, _, _ = problem()
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), gk.Sum())
    opt.add_param_group({"params": z})
    opt.update([z.real.sum(), 2 * z.imag.sum()])
    assert z.tolist() == [0.5 - 1j] * 2
