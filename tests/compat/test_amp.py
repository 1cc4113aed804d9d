"""Tests of PCGrad and GradVac over micro-batches and under a scaler, with the interface of a public project."""

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradkern import reference
from gradkern.compat.amp import GradVacAMP, PCGradAMP
from tests import originals
from tests.models import MultiHead, problem
from tests.tolerances import TOLERANCES, assert_near

Make = Callable[..., Any]

CLASSES = {
    "PCGradAMP": PCGradAMP,
    "GradVacAMP": lambda T, opt, *more, **named: GradVacAMP(T, opt, "cpu", *more, **named),
}


@pytest.fixture(autouse=True)
def _python_seed() -> Iterator[None]:
    before = random.getstate()
    random.seed(0)
    yield
    random.setstate(before)


@pytest.fixture(params=list(CLASSES))
def make(request: pytest.FixtureRequest) -> Make:
    return CLASSES[request.param]


def float64_problem() -> tuple[MultiHead, Tensor, Tensor]:
    model, x, y = problem()
    return model.double(), x.double(), y.double()


def micro_batches(model: MultiHead, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """Return the losses of the two halves of a batch. They add up to the whole batch's losses."""
    return [[loss / 2 for loss in model.losses(x[h], y[:, h])] for h in (slice(0, 8), slice(8, 16))]


def values(params: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in params.parameters()]


def pulled(make: Make, pulls: Tensor, n_steps: int = 1) -> Tensor:
    """Return minus the sum of the updates: SGD moves a parameter from 0, and task t's gradient is row t."""
    p = torch.zeros_like(pulls[0], requires_grad=True)
    opt = make(len(pulls), torch.optim.SGD([p], lr=1.0))
    for _ in range(n_steps):
        opt.backward([(p * pull).sum() for pull in pulls])
        opt.step()
    return p.detach()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_two_tasks_without_heads_train_as_with_the_original(reduction: str) -> None:
    """Train two tasks: their order does not matter, and neither opposes its own gradient, so projections agree."""
    seen: list[list[float]] = []
    trained = []
    for make in (originals.PCGradAMP, PCGradAMP):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).double()
        x, y = torch.randn(16, 6).double(), 3 * torch.randn(2, 16).double()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=50)
        opt = make(2, torch.optim.Adam(model.parameters(), lr=0.01), scaler, reduction)
        seen.append([])
        for _ in range(200):
            for h in (slice(0, 8), slice(8, 16)):
                out = model(x[h]).squeeze(-1)
                losses = [(out - target[h]).square().mean() / 2 for target in y]
                opt.backward(losses)
            seen[-1].append(torch.stack(losses).sum().item())
            opt.step()
        assert scaler.get_scale() == 64.0 * 2**4
        trained.append(values(model))
    # 1e-10: roundings of 1e-16, which 200 training steps carry on but enlarge by far less than a million times.
    assert_near(torch.tensor(seen[1]), torch.tensor(seen[0]), torch.tensor(seen[0]), 1e-10)
    for a, e in zip(trained[1], trained[0], strict=True):
        assert_near(a, e, 1.0, 1e-10)
    assert seen[1][-1] < 0.9 * seen[1][0]


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_micro_batches_add_up_to_the_papers_step_of_the_whole(
    make: Make, reduction: str, scale: float | None, cpu_offload: bool
) -> None:
    model, x, y = float64_problem()
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    n = sum(p.numel() for p in trunk)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    opt = make(3, torch.optim.SGD(model.parameters(), lr=0.1), scaler, reduction=reduction, cpu_offload=cpu_offload)
    targets = torch.zeros(3, 3)
    for step in range(4):
        rows = torch.zeros(3, n, dtype=torch.float64)
        own = torch.zeros(sum(p.numel() for p in heads), dtype=torch.float64)
        for losses in micro_batches(model, x, y):
            rows += torch.stack([originals.vector(originals.task_gradient(loss, trunk), trunk) for loss in losses])
            own += originals.vector(originals.task_gradient(sum(losses), heads), heads)
        torch.manual_seed(step)
        order = torch.rand(1, 3, 3)[0].argsort(-1).tolist()  # both draw these numbers from torch's generator
        if isinstance(opt, GradVacAMP):
            eps = torch.finfo(torch.float64).eps
            modified, targets = reference.gradvac(list(rows), order, targets, 0.01, eps)
        else:
            modified = reference.pcgrad(list(rows), order)
        update = torch.stack(modified).sum(0) / (3 if reduction == "mean" else 1)
        expected = [
            p.detach() - 0.1 * g
            for ps, v in ((trunk, update), (heads, own))
            for p, g in zip(ps, originals.pieces(v, ps), strict=True)
        ]

        torch.manual_seed(step)
        for losses in micro_batches(model, x, y):
            opt.backward(losses)
        assert all(p.grad is None for p in model.parameters())
        opt.step()
        assert all(p.grad is None for p in model.parameters())
        for a, e in zip([*trunk, *heads], expected, strict=True):
            assert_near(a.detach(), e, 1 + update.abs().max(), TOLERANCES[torch.float64])
        if isinstance(opt, GradVacAMP):
            assert_near(opt.rho_T, targets, 1.0, TOLERANCES[torch.float64])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_targets_that_stay_where_they_are_make_the_originals_gradvac(reduction: str) -> None:
    pulls = torch.tensor([[1.0, 2.0, -3.0], [-2.0, 0.5, 1.0]], dtype=torch.float64)
    results = [
        pulled(lambda T, opt, kind=kind: kind(T, opt, "cpu", beta=0.0, reduction=reduction), pulls, 3)
        for kind in (originals.GradVacAMP, GradVacAMP)
    ]
    assert_near(results[1], results[0], 10.0, TOLERANCES[torch.float64])
    assert (results[1] + 3 * pulls.sum(0) / (2 if reduction == "mean" else 1)).abs().max() > 0.1  # not the plain sum


def test_in_host_memory_the_step_is_the_same(make: Make, device: torch.device) -> None:
    """Train two tasks, since the generator of another device draws other orders."""
    results = []
    for cpu_offload in (False, True):
        model, x, y = problem(2, device)
        opt = make(2, torch.optim.SGD(model.parameters(), lr=0.1), cpu_offload=cpu_offload)
        for _ in range(3):
            for losses in micro_batches(model, x, y):
                opt.backward(losses)
            opt.step()
        results.append(values(model))
    for a, e in zip(*results, strict=True):
        assert a.device == e.device
        assert_near(a, e, 1 + e.abs().max(), TOLERANCES[torch.float32])
    assert not torch.equal(results[0][0], values(problem(2, device)[0])[0])


def test_callables_and_absent_tasks_take_part(make: Make) -> None:
    results = []
    for lazily in (False, True):
        model, x, y = problem()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        opt = make(3, torch.optim.SGD(model.parameters(), lr=0.1), scaler)
        torch.manual_seed(2)
        losses = [partial(model.loss, t, x, y) for t in range(2)]
        opt.backward([*losses, None] if lazily else [*(loss() for loss in losses), None])
        opt.step()
        results.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][-1], values(problem()[0])[-1])


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_callables_may_take_turns_in_training_their_adapters(make: Make, cpu_offload: bool) -> None:
    """Nothing is shared, so each adapter moves along its own task's gradients, as in a plain step."""
    ours = nn.ModuleList(nn.Linear(4, 1).double().requires_grad_(t == 0) for t in range(3))
    plain = copy.deepcopy(ours).requires_grad_(True)
    x = torch.randn(2, 8, 4).double()

    def loss(t: int, part: Tensor) -> Tensor:
        for s, adapter in enumerate(ours):
            adapter.requires_grad_(s == t)
        return sum(adapter(part) for adapter in ours).square().mean()

    opt = make(3, torch.optim.SGD(ours.parameters(), lr=0.1), cpu_offload=cpu_offload)
    for _ in range(2):
        for part in x:
            opt.backward([lambda t=t, part=part: loss(t, part) for t in range(3)])
        opt.step()
        inner = torch.optim.SGD(plain.parameters(), lr=0.1)
        sum(sum(adapter(part) for adapter in plain).square().mean() for part in x).backward()
        inner.step()
        inner.zero_grad()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_near(p.detach(), q.detach(), 1.0, 1e-12)  # float64


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_an_overflow_in_one_task_skips_the_step_and_leaves_nothing_behind(make: Make, cpu_offload: bool) -> None:
    pulls = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, 1.0], [1.0, -1.0, 2.0]]).half()
    p = torch.zeros(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = make(3, torch.optim.SGD([p], lr=0.125), scaler, cpu_offload=cpu_offload)
    states = []
    for size in (1.0, 100.0, 1.0):  # 3 * 100 * 1024 is past float16's 65504
        torch.manual_seed(0)
        opt.backward([(p.half() * pull).sum() * (size if t == 2 else 1.0) for t, pull in enumerate(pulls)])
        opt.step()
        states.append((p.detach().clone(), scaler.get_scale(), opt.state_dict().get("rho_T")))
    assert [scale for _, scale, _ in states] == [1024.0, 512.0, 512.0]
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[1][0], states[2][0])
    assert states[2][0].isfinite().all()
    if isinstance(opt, GradVacAMP):
        assert torch.equal(states[0][2], states[1][2])
        assert not torch.equal(states[1][2], states[2][2])
        assert states[2][2].isfinite().all()


def test_their_targets_only_fall_and_move_in_skipped_steps() -> None:
    agreeing = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 2.0], [-1.0, -2.0, 1.0]])
    overflowing = agreeing.clone()
    overflowing[1] = torch.inf
    theirs, ours = [], []
    for kind, seen in ((originals.GradVacAMP, theirs), (GradVacAMP, ours)):
        p = torch.zeros(3, requires_grad=True)
        scaler = torch.amp.GradScaler("cpu")
        opt = kind(3, torch.optim.SGD([p], lr=0.1), "cpu", scaler)
        for pulls in (agreeing, overflowing):
            opt.backward([(p * pull).sum() for pull in pulls])
            opt.step()
            seen.append(opt.rho_T.clone())
    agree = reference.cosine(agreeing[0], agreeing[1])
    assert theirs[0][0, 1] == 0
    assert (theirs[0] <= 0).all()
    assert ours[0][0, 1] > 0.005 * agree
    assert not torch.equal(theirs[0], theirs[1])
    assert torch.equal(ours[0], ours[1])


def test_their_cosine_past_minus_one_makes_the_parameters_nan() -> None:
    """Take opposite float32 gradients: their cosine is -1 up to rounding, and √(1 - φ²) is NaN beyond -1."""
    for kind in (originals.GradVacAMP, GradVacAMP):
        finite = []
        for seed in range(40):
            torch.manual_seed(seed)
            a = torch.randn(64)
            finite.append(
                bool(pulled(lambda T, opt, k=kind: k(T, opt, "cpu"), torch.stack((a, -a / 3))).isfinite().all())
            )
        assert all(finite) == (kind is GradVacAMP)


@pytest.mark.parametrize("name", list(CLASSES))
def test_their_float16_overflows_to_the_plain_sum(name: str) -> None:
    """Use gradients whose squares, 256², exceed float16's 65504: division by infinity removes all conflict."""
    n = 80_000
    pulls = torch.ones(2, n, dtype=torch.float16)
    pulls[1, :50_000] = -1  # dot product -20000
    kinds = {"PCGradAMP": originals.PCGradAMP, "GradVacAMP": lambda T, opt: originals.GradVacAMP(T, opt, "cpu")}
    if name == "PCGradAMP":
        modified = reference.pcgrad(list(pulls), [[1], [0]])
    else:
        modified, _ = reference.gradvac(
            list(pulls), [[1], [0]], torch.zeros(2, 2), 0.01, torch.finfo(torch.float32).eps
        )
    expected = -torch.stack(modified).sum(0)
    assert torch.equal(pulled(kinds[name], pulls), -pulls.sum(0))
    assert_near(pulled(CLASSES[name], pulls), expected, 2.0, TOLERANCES[torch.float16])
    assert (expected + pulls.sum(0)).abs().max() > 0.2


def test_their_mean_is_a_sum_where_a_gradient_is_zero() -> None:
    pulls = torch.tensor([[1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    assert torch.equal(
        pulled(partial(originals.PCGradAMP, reduction="mean"), pulls), -torch.tensor([1.0, 3.0]).double()
    )
    assert torch.equal(pulled(partial(PCGradAMP, reduction="mean"), pulls), -torch.tensor([1.0, 1.5]).double())


def test_a_checkpoint_goes_on_to_the_same_bits_and_is_one_of_theirs(make: Make) -> None:
    def run(opt: Any, model: MultiHead, x: Tensor, y: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        for _ in range(3):
            for losses in micro_batches(model, x, y):
                opt.backward(losses)
            opt.step()
        return values(model)

    def build(model: MultiHead) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return make(3, torch.optim.Adam(model.parameters(), lr=0.01), scaler)

    model, x, y = problem()
    opt = build(model)
    run(opt, model, x, y)
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    expected = run(opt, model, x, y)
    other, _, _ = problem()
    resumed = build(other)
    resumed.load_state_dict(saved)
    other.load_state_dict(weights)
    assert all(torch.equal(a, e) for a, e in zip(run(resumed, other, x, y), expected, strict=True))
    assert resumed.scaler.get_scale() == opt.scaler.get_scale() == 64.0 * 2**3
    with_targets = isinstance(opt, GradVacAMP)
    assert set(saved) == {"optimizer", "scaler"} | ({"rho_T"} if with_targets else set())
    torch.optim.Adam(other.parameters()).load_state_dict(saved["optimizer"])
    if with_targets:
        saved["rho_T"] = saved["rho_T"].float()
        saved["rho_T"][0, 1] = torch.nan
        resumed.load_state_dict(saved)
        assert resumed.rho_T[0, 1] == 0
        assert torch.equal(resumed.rho_T[1:], saved["rho_T"][1:].double())


def test_a_checkpoint_that_does_not_fit_changes_nothing(make: Make) -> None:
    model, x, y = problem()
    opt = make(3, torch.optim.Adam(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=64.0))
    opt.backward(model.losses(x, y))
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    other = make(3, torch.optim.Adam(model.trunk.parameters()), torch.amp.GradScaler("cpu", init_scale=8.0))
    without = {k: v for k, v in before.items() if k != "scaler"}
    with pytest.raises(ValueError, match="must hold 'scaler'"):
        opt.load_state_dict(without)
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(other.state_dict())
    if isinstance(opt, GradVacAMP):
        with pytest.raises(ValueError, match=r"rho_T in state_dict must be of shape \(3, 3\)"):
            opt.load_state_dict(before | {"rho_T": torch.zeros(2, 2)})
        assert torch.equal(opt.rho_T, before["rho_T"])
    assert opt.scaler.get_scale() == 64.0
    assert opt.optimizer.state_dict()["param_groups"] == before["optimizer"]["param_groups"]


def test_schedulers_take_the_optimizer(make: Make) -> None:
    model, x, y = problem()
    opt = make(3, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, gamma=0.5)
    opt.backward(model.losses(x, y))
    opt.step()
    scheduler.step()
    assert opt.optimizer.param_groups[0]["lr"] == 0.05


def test_zero_grad_drops_the_rows(make: Make) -> None:
    results = []
    for dropped in (False, True):
        model, x, y = problem()
        opt = make(3, torch.optim.SGD(model.parameters(), lr=0.1))
        if dropped:
            opt.backward(model.losses(100 * x, y))
            opt.zero_grad()
        torch.manual_seed(0)
        opt.backward(model.losses(x, y))
        opt.step()
        results.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_backward_pass_that_raises_halfway_is_no_part_of_a_step(make: Make) -> None:
    def failing() -> Tensor:
        raise ArithmeticError("no loss")

    model, x, y = problem()
    opt = make(3, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArithmeticError):
        opt.backward([*model.losses(x, y)[:2], failing])
    for call in (opt.step, lambda: opt.backward(model.losses(x, y))):
        with pytest.raises(RuntimeError, match="has raised"):
            call()
    opt.zero_grad()
    opt.backward(model.losses(x, y))
    opt.step()


def test_bad_arguments_are_named(make: Make) -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        make(3, inner, reduction="max")
    with pytest.raises(ValueError, match="num_tasks must be an integer from 1 to"):
        make(0, inner)
    with pytest.raises(TypeError, match="optimizer must be"):
        make(3, model)
    with pytest.raises(TypeError, match="scaler must be"):
        make(3, inner, "scaler")
    with pytest.raises(TypeError, match="cpu_offload must be"):
        make(3, inner, cpu_offload="cpu")
    with pytest.raises(ValueError, match=r"beta must be .* got 2"):
        GradVacAMP(3, inner, "cpu", beta=2)
    opt = make(3, inner)
    with pytest.raises(ValueError, match="mt_losses must have num_tasks=3 entries, got 2"):
        opt.backward(model.losses(x, y)[:2])
    with pytest.raises(RuntimeError, match="without a backward"):
        opt.step()


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_losses_in_one_tensor_are_taken_one_by_one(make: Make, cpu_offload: bool) -> None:
    """Without heads they give what a list gives. The original, too, iterates over them."""
    pulls = torch.tensor([[1.0, 0.1, 0.0], [-1.0, 0.1, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    results = []
    for one_tensor in (False, True):
        p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        opt = make(3, torch.optim.SGD([p], lr=1.0), cpu_offload=cpu_offload)
        torch.manual_seed(0)
        for _ in range(2):
            opt.backward(pulls @ p if one_tensor else [pull @ p for pull in pulls])
        opt.step()
        results.append(p.detach())
    assert_near(results[1], results[0], 1.0, TOLERANCES[torch.float64])
    assert results[0].abs().sum() > 1
    opt = make(3, torch.optim.SGD([p], lr=1.0))
    for losses, error in ((p.sum(), TypeError), ((pulls @ p)[:2], ValueError), ({p.sum()}, TypeError), (3, TypeError)):
        with pytest.raises(error, match="mt_losses must"):
            opt.backward(losses)


class Fails(torch.optim.SGD):
    """It raises in some of its steps, before it has changed anything."""

    fails = True

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError
        return super().step(closure)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_raises_loses_the_rows_alone(make: Make, scaled: bool) -> None:
    results = []
    for fails in (True, False):
        model, x, y = problem()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
        opt = make(3, Fails(model.parameters(), lr=0.1), scaler)
        opt.optimizer.fails = False
        for step in range(3):
            torch.manual_seed(step)
            opt.backward(model.losses(x, y))
            if fails and step == 1:
                before = copy.deepcopy(opt.state_dict()), values(model)
                grads = [p.grad for p in model.parameters()]
                opt.optimizer.fails = True
                with pytest.raises(MemoryError):
                    opt.step()
                opt.optimizer.fails = False
                now = opt.state_dict()
                assert now.get("scaler") == before[0].get("scaler")
                assert "rho_T" not in now or torch.equal(now["rho_T"], before[0]["rho_T"])
                assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
                with pytest.raises(RuntimeError, match=r"step\(\) without a backward"):
                    opt.step()
                torch.manual_seed(step)
                opt.backward(model.losses(x, y))
            opt.step()
        results.append((values(model), opt.state_dict().get("rho_T", torch.zeros(()))))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])
