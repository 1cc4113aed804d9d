"""Each recipe keeps its promise, compared with pure PyTorch, with the reference, or with a second run."""

import copy
import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.compiler.config
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import gradkern as gk
from gradkern import reference
from tests.models import flat, task_gradients
from tests.tolerances import assert_near

ROOT = Path(__file__).parents[2]
NAMES = (
    "accumulation",
    "activation_checkpointing",
    "amp",
    "clipping",
    "compile",
    "every_kth_step",
    "freezing",
    "missing_task",
    "resume",
    "schedulers",
    "shared_features",
)
ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


def recipe(name: str) -> ModuleType:
    """Import a recipe as a script beside it would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        return importlib.import_module(name)


RECIPES = {name: recipe(name) for name in ("tasks", *NAMES)}
tasks = RECIPES["tasks"]


@pytest.fixture(autouse=True)
def _quick_to_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without a C++ compiler, from torch's default settings."""
    monkeypatch.setattr(RECIPES["compile"], "BACKEND", "aot_eager")
    with torch._functorch.config.patch(donated_buffer=True), torch.compiler.config.patch(cache_key_tag=""):
        yield
    torch.compiler.reset()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def bits(state: Any) -> Any:
    """Copy nested state with tensors as bytes, so that == compares bits."""
    if isinstance(state, Tensor):
        return state.dtype, tuple(state.shape), state.detach().cpu().numpy().tobytes()
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [bits(value) for value in state]
    return copy.deepcopy(state)


def grads(model: nn.Module) -> Tensor:
    params = list(model.parameters())
    return flat([p.grad for p in params], params)


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    RECIPES[name].main()
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert "nan" not in out


def test_it_runs_as_a_script() -> None:
    script = [sys.executable, "recipes/every_kth_step.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert out == "surgery in 10 of 50 steps, from step 10 on\n"  # 10, 14, …, 46


def test_amp_an_overflow_in_one_task_changes_nothing(device: torch.device) -> None:
    amp = RECIPES["amp"]
    ends = []
    for overflow in (True, False):
        model, opt, scaler = amp.build(device.type)
        (x0, y0), (x1, y1), (x2, y2) = tasks.batches(3, device.type)
        amp.train_step(model, opt, scaler, x0, y0)
        assert scaler.get_scale() == 2.0**16
        if overflow:
            before = bits([model.state_dict(), opt.state_dict()])
            y1[1] = 1e8  # scaled, the gradient of task 1 is beyond float16's 65504; its loss, 1e16, is a float32
            info = amp.train_step(model, opt, scaler, x1, y1)
            assert info.losses.isfinite().all()
            assert (~info.gramian.isfinite()).tolist() == [[i == 1 or j == 1 for j in range(3)] for i in range(3)]
            assert bits([model.state_dict(), opt.state_dict()]) == before
            assert opt.aggregator.targets.any()  # GradVac had a state to keep
        else:
            scaler.update(2.0**15)
        assert scaler.get_scale() == 2.0**15
        torch.manual_seed(1)  # for the random order; the overflowed step has drawn one too
        amp.train_step(model, opt, scaler, x2, y2)
        ends.append(bits([model.state_dict(), opt.state_dict()]))
    assert ends[0] == ends[1] != before


def test_amp_the_gradient_is_the_one_without_it(device: torch.device) -> None:
    amp = RECIPES["amp"]
    model, opt, scaler = amp.build(device.type)
    plain = copy.deepcopy(model)
    ((x, y),) = tasks.batches(1, device.type)
    torch.manual_seed(1)
    amp.train_step(model, opt, scaler, x, y)
    torch.manual_seed(1)
    gk.backward(tasks.task_losses(plain(x), y), plain, aggregator=gk.GradVac())
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    # The clipped gradient has length 1. Each entry is a sum of products of float16 numbers, which round by 5e-4.
    assert_near(grads(model), grads(plain), 1.0, 5e-3)


def test_both_ways_of_clipping_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping = RECIPES["clipping"]
    (a, norms), (b, norms_in_one) = clipping.before_step(20), clipping.within_step(20)
    norms = torch.stack(norms)
    assert 0 < (norms > clipping.MAX_NORM).sum() < 20
    # The norms are float32 sums of squares in two orders. The parameters move by Adam's steps of 1e-3, whose direction
    # a rounding can turn if a gradient is near zero: the tolerance is a tenth of a step.
    assert_near(torch.stack(norms_in_one), norms, norms, 1e-4)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_near(p.detach(), q.detach(), 1.0, 1e-4)
    monkeypatch.setattr(clipping, "MAX_NORM", 1e6)
    unclipped, _ = clipping.before_step(20)
    assert max((p - q).abs().max() for p, q in zip(a.parameters(), unclipped.parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_schedulers_on_it_and_on_the_optimizer_inside_are_the_same(kind: str) -> None:
    schedulers = RECIPES["schedulers"]

    def scheduler(opt: torch.optim.Optimizer) -> LRScheduler:
        if kind == "LambdaLR":
            return LambdaLR(opt, schedulers.warm_up_then_cosine)
        return OneCycleLR(opt, max_lr=1e-2, total_steps=schedulers.N_STEPS + 1)  # moves beta1 too

    seen = []
    for inside in (False, True):
        model, opt = schedulers.build()
        rates = schedulers.train(model, opt, scheduler(opt.optimizer if inside else opt))
        seen.append((rates, bits([model.state_dict(), opt.state_dict()])))
    assert seen[0] == seen[1]
    if kind == "LambdaLR":
        cosine = [0.01 * math.cos(math.pi * k / 80) ** 2 for k in range(40)]  # (1 + cos a) / 2 is cos² of a / 2
        assert rates == pytest.approx([0.001 * k for k in range(1, 11)] + cosine)


def flat_parameters(model: nn.Module) -> Tensor:
    params = list(model.parameters())
    return flat(params, params)


def test_accumulation_trains_as_one_big_batch(float64: None) -> None:
    """The twin model takes the whole batch in one step, with the reference and torch only."""
    r = RECIPES["accumulation"]
    model, opt = r.build()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    trunk = list(twin.trunk.parameters())
    for x, y in tasks.batches(10):
        losses = tasks.task_losses(twin(x), y)
        found = task_gradients(losses, list(twin.parameters()))
        for k, p in enumerate(twin.parameters()):
            p.grad = sum(row[k] for row in found if row[k] is not None)
        combined = sum(reference.pcgrad([flat(row[: len(trunk)], trunk) for row in found], [[0, 1, 2]] * 3))
        for p, g in zip(trunk, combined.split([p.numel() for p in trunk]), strict=True):
            p.grad = g.view_as(p)
        info = r.train_step(model, opt, x, y)
        adamw.step()
        assert_near(info.losses, torch.stack(losses).detach(), 1.0, 1e-8)
    # 1e-8 allows for float64 sums in another order, which ten steps of Adam divide by small roots.
    assert_near(flat_parameters(model), flat_parameters(twin), 1.0, 1e-8)


def test_shared_features_train_as_a_pass_per_task(float64: None) -> None:
    r = RECIPES["shared_features"]
    torch.manual_seed(0)
    twin = tasks.Model()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(twin.named_parameters(), lr=1e-2), gk.PCGrad(order=range(3)))
    for x, y in tasks.batches(10):
        opt.zero_grad()
        opt.backward([lambda t=t, x=x, y=y: tasks.task_losses(twin(x), y)[t] for t in range(3)])
        opt.step()
    for batched in (False, True):
        # 1e-8 has the same reason as above.
        assert_near(flat_parameters(r.train(10, batched)[0]), flat_parameters(twin), 1.0, 1e-8)


@pytest.mark.parametrize("dropout", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(dropout: bool) -> None:
    plain, checkpointed = tasks.Model(), RECIPES["activation_checkpointing"].Checkpointed()
    checkpointed.load_state_dict(plain.state_dict())
    ((x, y),) = tasks.batches(1)
    passes: dict[nn.Module, int] = {plain: 0, checkpointed: 0}

    def count(model: nn.Module) -> None:
        passes[model] += 1

    for model in (plain, checkpointed):
        model.trunk.register_forward_pre_hook(lambda *_, model=model: count(model))
        if dropout:
            model.trunk.append(nn.Dropout(0.5))
        torch.manual_seed(1)
        gk.backward(tasks.task_losses(model(x), y), model, aggregator=gk.PCGrad(order=ORDER))
    assert torch.equal(grads(plain), grads(checkpointed))
    assert passes == {plain: 1, checkpointed: 1 + 3}


def test_activation_checkpointing_of_the_reentrant_kind_raises() -> None:
    model = RECIPES["activation_checkpointing"].Checkpointed()
    model.use_reentrant = True
    ((x, y),) = tasks.batches(1)
    x.requires_grad_()  # otherwise torch warns, and trains nothing below a reentrant checkpoint
    with pytest.raises(ValueError, match=r"losses\[0\] runs through reentrant .* use_reentrant=False"):
        gk.backward(tasks.task_losses(model(x), y), model, aggregator=gk.PCGrad())
    assert all(p.grad is None for p in model.parameters())


def test_freezing_leaves_the_frozen_alone_and_every_target_in_its_place() -> None:
    """The reference keeps the targets of each layer under its name."""
    freezing, beta = RECIPES["freezing"], 0.3
    model, opt = freezing.build()
    opt.aggregator = gk.GradVac(beta, order=ORDER)
    layers = {"trunk.0": model.trunk[0], "trunk.2": model.trunk[2]}
    targets = {name: torch.zeros(3, 3, dtype=torch.float64) for name in layers}
    eps = torch.finfo(torch.float32).eps
    schedule = [("trunk.0",), ("trunk.0",), (), (), ("trunk.2",), ("trunk.0",), ()]
    for frozen, (x, y) in zip(schedule, tasks.batches(7), strict=True):
        for name, layer in layers.items():
            layer.requires_grad_(name not in frozen)
        expected = {}
        for name in layers.keys() - frozen:
            params = list(layers[name].parameters())
            rows = [flat(row, params) for row in task_gradients(tasks.task_losses(model(x), y), params)]
            modified, targets[name] = reference.gradvac(rows, ORDER, targets[name], beta, eps)
            expected[name] = torch.stack(modified).sum(0), sum(row.norm() for row in rows)
        still = [[(p, opt.state.get(p)) for p in layers[name].parameters()] for name in frozen]
        before = bits(still)
        info = freezing.train_step(model, opt, x, y)
        assert bits(still) == before
        for name, layer in layers.items():
            params = list(layer.parameters())
            if name in frozen:
                assert all(p.grad is None for p in params)
            else:  # the tolerance is that of a float32 Gramian, whose roundings stay in the targets
                assert_near(flat([p.grad for p in params], params), *expected[name], 1e-4)
        for target, name in zip(info.targets, layers, strict=False):
            assert_near(target, targets[name], 1.0, 1e-4)
        assert info.targets.shape == (5, 3, 3)
        assert not info.targets[2:].any()  # the heads have no surgery


@pytest.mark.parametrize("memory", [False, True])
def test_missing_task_takes_part_by_its_last_gradient_or_not_at_all(memory: bool) -> None:
    model, opt = RECIPES["missing_task"].build(memory)
    opt.aggregator = gk.PCGrad(order=ORDER)
    trunk = list(model.trunk.parameters())
    remembered = reference.Memory(3, sum(p.numel() for p in trunk))
    schedule = [(0, 1), (0, 1, 2), (0, 1), (2,), (0, 2), (1,)]
    for present, (x, y) in zip(schedule, tasks.batches(6), strict=True):
        losses = tasks.task_losses(model(x), y)
        there = task_gradients([losses[t] for t in present], trunk)
        rows = {t: flat(row, trunk) for t, row in zip(present, there, strict=True)}
        if not memory:
            remembered = reference.Memory(3, sum(p.numel() for p in trunk))
        expected = remembered.step(rows, lambda rows: reference.pcgrad(rows, ORDER))
        absent = [model.heads[t].state_dict() for t in range(3) if t not in present]
        before = bits(absent)
        info = RECIPES["missing_task"].train_step(model, opt, x, [y[t] if t in present else None for t in range(3)])
        # The tolerance is that of a float32 Gramian, whose roundings nearly parallel rows magnify.
        assert_near(flat([p.grad for p in trunk], trunk), expected, sum(row.norm() for row in remembered.rows), 1e-4)
        assert bits(absent) == before
        assert info.losses.isnan().tolist() == [t not in present for t in range(3)]


def test_every_kth_step_the_others_are_ordinary_training_to_the_bit() -> None:
    """A twin without surgery takes each step from the recipe's state."""
    every = RECIPES["every_kth_step"]
    model, opt = every.build()
    twin = tasks.Model()
    inner = torch.optim.AdamW(twin.named_parameters(), lr=1e-2)
    differ = []
    for step, (x, y) in enumerate(tasks.batches(24)):
        twin.load_state_dict(model.state_dict())
        inner.load_state_dict(copy.deepcopy(opt.optimizer.state_dict()))  # torch would use the same tensors
        inner.zero_grad()
        sum(tasks.task_losses(twin(x), y)).backward()
        inner.step()
        info = every.train_step(model, opt, step, x, y)
        if bits([model.state_dict(), opt.optimizer.state_dict()]) != bits([twin.state_dict(), inner.state_dict()]):
            differ.append(step)
            assert info.conflicts.any()
    assert differ == [10, 14, 18, 22]


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_resume_goes_on_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    resume = RECIPES["resume"]
    whole, first, second = resume.build(0), resume.build(0), resume.build(1)
    for run, until in ((whole, None), (first, stop)):
        torch.manual_seed(0)
        resume.train(run, until)
    resume.save(first, tmp_path / "checkpoint.pt")
    torch.manual_seed(5)  # the state of torch's generator must not matter
    resume.load(second, tmp_path / "checkpoint.pt")
    resume.train(second)
    assert whole["sampler"].epoch == 2
    for name, part in whole.items():
        assert bits(part.state_dict()) == bits(second[name].state_dict()), name


@pytest.mark.parametrize("way", ["task_by_task", "one_forward", "surgery_inside"])
def test_compile_changes_no_gradient(way: str) -> None:
    model = tasks.Model()
    plain = copy.deepcopy(model)
    backward = getattr(RECIPES["compile"], way)(model)
    for x, y in tasks.batches(2):
        model.zero_grad()
        plain.zero_grad()
        backward(x, y)
        info = gk.backward(tasks.task_losses(plain(x), y), plain, aggregator=gk.PCGrad(order=[0, 1, 2]))
        assert info.conflicts.any()
        assert_near(grads(model), grads(plain), info.norms.sum(), 3e-6)  # float32, summed in another order


def test_compile_without_the_setting_raises_and_names_the_setting() -> None:
    model = tasks.Model()
    ((x, y),) = tasks.batches(1)
    compiled = torch.compile(model, backend="aot_eager")
    sum(tasks.task_losses(compiled(x), y)).backward()  # compiles a backward pass that may overwrite
    before = grads(model)
    with pytest.raises(
        ValueError, match=r"set torch\._functorch\.config\.donated_buffer = False and torch\.compiler\."
    ):
        gk.backward(tasks.task_losses(compiled(x), y), model, aggregator=gk.PCGrad(), shared=model.trunk)
    assert torch.equal(grads(model), before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # torch's own use of it
def test_compile_after_ordinary_training_takes_no_code_from_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles ReLU's backward pass to code that overwrites. The test is quick once the disk cache has it."""
    monkeypatch.setattr(RECIPES["compile"], "BACKEND", "inductor")
    model = tasks.Model()
    model.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    ((x, y),) = tasks.batches(1)
    sum(tasks.task_losses(torch.compile(model)(x), y)).backward()
    torch.compiler.reset()
    model.zero_grad()
    plain = copy.deepcopy(model)
    RECIPES["compile"].one_forward(model)(x, y)
    info = gk.backward(tasks.task_losses(plain(x), y), plain, aggregator=gk.PCGrad(order=[0, 1, 2]))
    assert_near(grads(model), grads(plain), info.norms.sum(), 3e-6)  # float32, summed in another order


def test_compile_hides_which_loss_reaches_which_head() -> None:
    """Without ``shared=``, which the recipe gives, the heads enter the dot products."""
    model = tasks.Model()
    ((x, y),) = tasks.batches(1)
    compiled = torch.compile(model, backend="aot_eager")
    seen = gk.backward(tasks.task_losses(compiled(x), y), model, aggregator=gk.PCGrad())
    rows = [
        flat(row, list(model.parameters()))
        for row in task_gradients(tasks.task_losses(model(x), y), list(model.parameters()))
    ]
    assert_near(seen.gramian, reference.gramian(rows), seen.gramian.abs().max(), 3e-6)
    named = gk.backward(tasks.task_losses(compiled(x), y), model, aggregator=gk.PCGrad(), shared=model.trunk)
    assert (named.norms < seen.norms).all()
