"""An update that raises leaves everything as it was, except what the wrapped optimizer itself has done."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradkern as gk
from tests.models import MultiHead, problem


class Refused(Exception):
    """The error that a hook raises in these tests."""


def refuse(*_: Any) -> None:
    raise Refused


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def methods() -> dict[str, gk.Aggregator]:
    torch.manual_seed(3)  # for the network
    generator = torch.Generator().manual_seed(1)
    return {
        "pcgrad": gk.PCGrad(generator=generator),
        "gradvac": gk.GradVac(beta=0.5, generator=generator),
        "attention": gk.GradAttention(16, 8, 1, generator=generator),
        "sum": gk.Sum(),
    }


KINDS: dict[str, type[Optimizer]] = {"gk.AdamW": gk.optim.AdamW, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
BESIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": dict,
    "with modifiers": lambda: {
        "suppression": gk.Suppression(0.3, seed=1),
        "conflict_lr": gk.ConflictLR(),
        "memory": True,
    },
}


class Run:
    """A model in training, and everything that a step may change."""

    def __init__(self, kind: str, method: str, beside: str = "alone") -> None:
        self.model, self.x, self.y = problem()
        inner = KINDS[kind](self.model.named_parameters(), lr=0.1)
        self.opt = gk.SurgeryOptimizer(inner, methods()[method], **BESIDE[beside]())

    def losses(self, scale: float = 1.0) -> list[Tensor]:
        return [scale * loss for loss in self.model.losses(self.x, self.y)]

    def seen(self) -> Any:
        """Return copies of all that must be as before."""
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        values = [p.detach().clone() for p in self.model.parameters()]
        return values, grads, copy.deepcopy(self.opt.state_dict()), self.opt._pending.step_scale


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


FAILURES: dict[str, Callable[[Run], Any]] = {
    "a hook of the wrapper": lambda run: run.opt.register_step_pre_hook(refuse),
    "a hook of the optimizer": lambda run: run.opt.optimizer.register_step_pre_hook(refuse),
    "a hook of a parameter": lambda run: run.model.heads[0].bias.register_post_accumulate_grad_hook(refuse),
    "a keyboard interrupt": lambda run: run.opt.register_step_pre_hook(interrupt),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_as_if_the_failed_update_had_not_been(kind: str, method: str, beside: str, failure: str) -> None:
    run, twin = Run(kind, method, beside), Run(kind, method, beside)
    for _ in range(2):  # before the first step, when there is no state, and after it
        before = run.seen()
        handle = FAILURES[failure](run)
        with pytest.raises((Refused, KeyboardInterrupt)):
            run.opt.update(run.losses(), max_norm=None)
        handle.remove()
        assert same(run.seen(), before)
        run.opt.update(run.losses())
        twin.opt.update(twin.losses())
        assert same(run.seen(), twin.seen())


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_in_grad_is_there_again(kind: str) -> None:
    """The same tensors with the same numbers, and κ of the backward pass that wrote them."""
    run, twin = Run(kind, "gradvac", "with modifiers"), Run(kind, "gradvac", "with modifiers")
    for one in (run, twin):
        one.opt.backward(one.losses())
    grads = [p.grad for p in run.model.parameters()]
    before = run.seen()
    assert before[-1] is not None
    handle = run.opt.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(Refused):
        run.opt.update(run.losses(3.0), max_norm=0.01)
    handle.remove()
    assert same(run.seen(), before)
    assert all(p.grad is g for p, g in zip(run.model.parameters(), grads, strict=True))
    for one in (run, twin):
        one.opt.update(one.losses())
    assert same(run.seen(), twin.seen())


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_unscales_the_next_attempt(kind: str, max_norm: float | None) -> None:
    """It has noted that it has unscaled the gradients; those of the next attempt are others."""
    run, twin = Run(kind, "gradvac"), Run(kind, "gradvac")
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]

    def update(one: Run, scaler: torch.amp.GradScaler) -> None:
        one.opt.update([scaler.scale(loss) for loss in one.losses()], scaler=scaler, max_norm=max_norm)
        scaler.update()

    handle = run.opt.register_step_pre_hook(refuse)
    with pytest.raises(Refused):
        update(run, scalers[0])
    handle.remove()
    update(run, scalers[0])
    update(twin, scalers[1])
    assert same(run.seen(), twin.seen())
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_parameters_that_the_optimizer_has_moved_stay_moved() -> None:
    """A failure in the middle of a step or after it is the one thing that cannot be taken back; all else is."""

    class FailsHalfway(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].data.add_(1.0)
            raise MemoryError

    model, x, y = problem()
    opt = gk.SurgeryOptimizer(FailsHalfway(model.parameters(), lr=0.1), gk.GradVac(), memory=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(MemoryError):
        opt.update(model.losses(x, y))
    first, *others = model.parameters()
    assert torch.equal(first, before[0] + 1.0)
    assert all(torch.equal(p, b) for p, b in zip(others, before[1:], strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert opt.aggregator.targets is None
    assert opt.state_dict()["surgery"]["memory"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_raises_after_the_step_finds_the_parameters_moved(kind: str) -> None:
    run = Run(kind, "gradvac", "with modifiers")
    values, grads, state, scale = run.seen()
    run.opt.register_step_post_hook(refuse)
    with pytest.raises(Refused):
        run.opt.update(run.losses())
    values_now, grads_now, state_now, scale_now = run.seen()
    assert not same(values_now, values)
    assert same(grads_now, grads)
    assert same(state_now["surgery"], state["surgery"])
    assert scale_now is scale is None


@pytest.mark.parametrize("losses", [[], [None, None], 3, ["no loss"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_update_leaves_kappa_for_the_step(kind: str, losses: Any) -> None:
    """Before its step the update would have had another κ, of its own backward pass."""
    run, twin = Run(kind, "pcgrad", "with modifiers"), Run(kind, "pcgrad", "with modifiers")
    for one in (run, twin):
        one.opt.backward(one.losses())
    with pytest.raises((TypeError, ValueError)):
        run.opt.update(losses)
    for one in (run, twin):
        one.opt.step()
    assert same(run.seen(), twin.seen())


class Fails(gk.ConflictLR):
    """It raises once the method has given its weights."""

    def scale(self, M: Tensor) -> Tensor:
        raise MemoryError


@pytest.mark.parametrize("method", methods())
def test_a_backward_pass_that_fails_behind_the_method_takes_its_state_back(method: str) -> None:
    model, x, y = problem()
    aggregator = methods()[method]
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters()), aggregator)
    opt.backward(model.losses(x, y))
    before = copy.deepcopy(aggregator.state_dict())
    opt.zero_grad()
    opt.conflict_lr = Fails()
    with pytest.raises(MemoryError):
        opt.backward(model.losses(x, y))
    assert same(aggregator.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_captured_graphs_targets_stay_where_they_are() -> None:
    """Numbers are put back into the memory that a CUDA graph reads."""
    run = Run("SGD", "gradvac")
    run.opt.update(run.losses())
    targets = run.opt.aggregator.targets
    run.opt.register_step_pre_hook(refuse)
    with pytest.raises(Refused):
        run.opt.update(run.losses())
    assert run.opt.aggregator.targets is targets


def test_a_hook_of_a_parameter_that_raises_in_backward_comes_after_the_step() -> None:
    """``.grad`` is written by then, as in torch's own backward pass."""
    model, x, y = problem()
    method = gk.GradVac()
    model.heads[0].bias.register_post_accumulate_grad_hook(refuse)
    with pytest.raises(Refused):
        gk.backward(model.losses(x, y), model, aggregator=method)
    assert all(p.grad is not None for p in model.parameters())
    assert method.targets is not None


def two_losses(p: Tensor) -> list[Tensor]:
    """Return two losses without conflict, whose gradients sum to (3, 1)."""
    return [p @ torch.tensor([1.0, 2.0]), p @ torch.tensor([2.0, -1.0])]


def test_an_optimizer_that_needs_a_closure_is_refused_beforehand() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = gk.SurgeryOptimizer(torch.optim.LBFGS([p]), gk.PCGrad())
    ran = []
    losses = [lambda: ran.append(p) or two_losses(p)[0]] * 2
    for _ in range(2):
        with pytest.raises(TypeError, match=r"update\(\) calls step\(\) without a closure, and LBFGS needs one"):
            opt.update(losses)
        assert p.grad is None
    assert not ran
    opt.backward(two_losses(p))
    assert torch.equal(p.grad, torch.tensor([3.0, 1.0]))


def test_an_optimizer_that_may_have_a_closure_is_not_refused() -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None, *more: Any, grad_scaler: Any = None, **others: Any) -> Any:
            return super().step(closure)

    p = nn.Parameter(torch.zeros(2))
    gk.SurgeryOptimizer(Own([p], lr=1.0), gk.PCGrad()).update(two_losses(p))
    assert torch.equal(p.detach(), torch.tensor([-3.0, -1.0]))


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.GradVac(), gk.Sum()])
def test_sparse_gradients_cannot_be_clipped_and_leave_nothing(method: gk.Aggregator) -> None:
    table = nn.Embedding(3, 2, sparse=True)
    nn.init.zeros_(table.weight)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(table.parameters(), lr=1.0), method)
    before = copy.deepcopy(opt.state_dict())

    def losses() -> list[Tensor]:
        return [table(torch.tensor([0])).sum(), table(torch.tensor([0, 1])).sum()]

    for _ in range(2):
        with pytest.raises(TypeError, match=r"max_norm cannot clip the sparse gradient of .*\(3, 2\)"):
            opt.update(losses(), max_norm=1.0)
        assert table.weight.grad is None
        assert same(opt.state_dict(), before)
    opt.update(losses())
    assert torch.equal(table.weight.detach(), torch.tensor([[-2.0, -2.0], [-1.0, -1.0], [0.0, 0.0]]))


def test_a_twin_is_a_twin() -> None:
    """Otherwise the comparisons above would prove nothing."""
    runs = [Run("SGD", "gradvac", "with modifiers") for _ in range(2)]
    for run in runs:
        run.opt.update(run.losses())
    assert same(runs[0].seen(), runs[1].seen())
    runs[0].opt.update(runs[0].losses())
    assert not same(runs[0].seen(), runs[1].seen())
    assert isinstance(runs[0].model, MultiHead)
