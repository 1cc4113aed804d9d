"""Tests of PCGrad with the interface of two public projects: ours by default, and theirs draw for draw."""

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.compat.pcgrad import MODES, PCGrad
from tests import originals
from tests.models import MultiHead, problem, task_gradients
from tests.tolerances import TOLERANCES, assert_near

Make = Callable[[torch.optim.Optimizer], Any]

# 1e-10: roundings of 1e-16, which 200 training steps carry on but enlarge by far less than a million times.
AFTER_TRAINING = 1e-10


@pytest.fixture(autouse=True)
def _python_seed() -> Iterator[None]:
    before = random.getstate()
    random.seed(0)
    yield
    random.setstate(before)


def theirs(reduction: str) -> Make:
    module = pytest.importorskip("pytorch_optimizer.optimizer.pcgrad")
    return partial(module.PCGrad, reduction=reduction)


def peer(compat: str, reduction: str) -> Make:
    return theirs(reduction) if compat == "pytorch_optimizer" else partial(originals.PCGrad, reduction=reduction)


def float64_problem() -> tuple[MultiHead, Tensor, Tensor]:
    model, x, y = problem()
    return model.double(), x.double(), y.double()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def train(make: Make, n_steps: int) -> tuple[MultiHead, list[float]]:
    """Train a model with a head that no task reaches by ``n_steps`` of Adam. Return it and each step's summed loss."""
    model, x, y = float64_problem()
    model.idle = nn.Linear(3, 2).double()
    opt = make(torch.optim.Adam(model.parameters(), lr=0.01))
    random.seed(7)
    seen = []
    for _ in range(n_steps):
        losses = model.losses(x, y)
        seen.append(torch.stack(losses).sum().item())
        opt.pc_backward(losses)
        opt.step()
    return model, seen


@pytest.mark.parametrize("compat", MODES[1:])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_run_of_theirs_is_repeated(compat: str, reduction: str) -> None:
    n_steps = 200 if reduction == "mean" else 50
    expected, their_losses = train(peer(compat, reduction), n_steps)
    drawn = random.random()
    actual, losses = train(partial(PCGrad, reduction=reduction, compat=compat), n_steps)
    assert random.random() == drawn  # as many numbers were drawn
    for a, e in zip(values(actual), values(expected), strict=True):
        assert_near(a, e, 1.0, AFTER_TRAINING)
    assert_near(torch.tensor(losses), torch.tensor(their_losses), torch.tensor(their_losses), AFTER_TRAINING)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("compat", MODES[1:])
def test_one_step_of_theirs_has_the_same_gradients(compat: str) -> None:
    results = []
    for make in (peer(compat, "mean"), partial(PCGrad, compat=compat)):
        model, x, y = float64_problem()
        model.trunk[0].weight.requires_grad_(False)
        opt = make(torch.optim.SGD(model.parameters(), lr=0.01))
        random.seed(3)
        opt.pc_backward(model.losses(x, y)[:2])  # no task reaches the third head
        results.append(gradients(model))
    assert [g is None for g in results[0]] == [g is None for g in results[1]]
    assert (results[1][-1] is None) == (compat == "pytorch_optimizer")
    for a, e in zip(results[1], results[0], strict=True):
        if a is not None and e is not None:
            assert_near(a, e, e.abs().max(), TOLERANCES[torch.float64])
    assert all(g is None or (g != 0).any() for g in results[1][2:6])


@pytest.mark.parametrize("compat", MODES[1:])
def test_many_tasks_are_projected_onto_their_own_gradients_too(compat: str) -> None:
    """Use six tasks in three dimensions: projections turn some gradients so far that they oppose their originals."""
    own_mattered = False
    for seed in range(20):
        pulls = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = []
        for make in (peer(compat, "mean"), partial(PCGrad, compat=compat)):
            p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            random.seed(seed)
            make(torch.optim.SGD([p], lr=0.1)).pc_backward([pull @ p for pull in pulls])
            assert p.grad is not None
            found.append(p.grad)
        assert_near(found[1], found[0], pulls.norm(), TOLERANCES[torch.float64])
        random.seed(seed)
        order = list(range(6))
        orders = [random.shuffle(order) or list(order) for _ in pulls]
        without = torch.stack(reference.pcgrad(list(pulls), orders)).mean(0)
        own_mattered |= bool((without - found[0]).abs().max() > 1e-3)
    assert own_mattered


@pytest.mark.parametrize("compat", MODES[1:])
def test_gradients_and_micro_batches_add_up(compat: str) -> None:
    model, x, y = float64_problem()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    random.seed(3)
    opt.pc_backward(model.losses(x, y))
    once = gradients(model)

    random.seed(3)
    opt.backward(model.losses(x, y))  # adds to what is there
    for p, g in zip(model.parameters(), once, strict=True):
        assert g is not None
        assert_near(p.grad, 2 * g, g.abs().max(), TOLERANCES[torch.float64])

    opt.zero_grad()
    random.seed(3)
    with opt.accumulate():
        for half in (slice(0, 8), slice(8, 16)):
            opt.backward([loss / 2 for loss in model.losses(x[half], y[:, half])])
    for p, g in zip(model.parameters(), once, strict=True):
        assert g is not None
        assert_near(p.grad, g, 1 + g.abs().max(), TOLERANCES[torch.float64])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_by_default_it_is_the_papers_on_shared_parameters(reduction: str) -> None:
    model, x, y = float64_problem()
    losses = model.losses(x, y)
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    grads = task_gradients(losses, trunk)
    own = torch.autograd.grad(sum(losses), heads, retain_graph=True)
    torch.manual_seed(5)
    order = torch.rand(1, 3, 3)[0].argsort(-1).tolist()  # PCGrad draws these numbers from torch's generator
    modified = torch.stack(reference.pcgrad([originals.vector(row, trunk) for row in grads], order))
    expected = modified.mean(0) if reduction == "mean" else modified.sum(0)

    state = random.getstate()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction)
    torch.manual_seed(5)
    info = opt.pc_backward(losses)
    assert random.getstate() == state
    assert isinstance(info, gk.SurgeryInfo)
    assert info.conflicts is not None
    assert info.conflicts.any()
    actual = originals.vector([p.grad for p in trunk], trunk)
    assert_near(actual, expected, modified.abs().sum(0), TOLERANCES[torch.float64])
    assert all(torch.equal(p.grad, g) for p, g in zip(heads, own, strict=True))  # type: ignore[arg-type]


def opposed(make: Make, size: float) -> tuple[Tensor, Tensor]:
    """Return ``.grad`` of a trunk that two tasks pull in nearly opposite directions, and of a head.

    The head's gradient has the size given.
    """
    trunk, *heads = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    pulls = torch.tensor([[1.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)
    losses = [pull @ trunk + size * head.sum() for pull, head in zip(pulls, heads, strict=True)]
    make(torch.optim.SGD([trunk, *heads], lr=0.1)).pc_backward(losses)
    assert trunk.grad is not None
    assert heads[0].grad is not None
    return trunk.grad, heads[0].grad


@pytest.mark.parametrize("compat", MODES[1:])
def test_heads_in_their_vectors_hide_conflict_and_grow(compat: str) -> None:
    pulls = torch.tensor([[1.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)
    expected = torch.stack(reference.pcgrad(list(pulls), [[1], [0]])).mean(0)
    for size in (0.01, 1.0, 100.0):
        trunk, head = opposed(PCGrad, size)
        assert_near(trunk, expected, 1.0, TOLERANCES[torch.float64])
        assert head.item() == size
    with_heads, head = opposed(peer(compat, "mean"), 1.0)
    assert head.item() > 1.2  # the other task's projection has added some of it
    assert (with_heads - expected).abs().max() > 0.04


@pytest.mark.parametrize("compat", MODES[1:])
def test_their_float16_overflows_to_the_plain_sum_or_worse(compat: str) -> None:
    """Use gradients whose squares, 256², exceed float16's 65504: a dot product over infinity gives no projection."""
    n = 80_000
    a = torch.ones(n, dtype=torch.float16)
    b = torch.where(torch.arange(n) < 50_000, -1.0, 1.0).half()  # dot product -20000
    results = []
    for make in (peer(compat, "mean"), PCGrad):
        p = torch.zeros(n, dtype=torch.float16, requires_grad=True)
        make(torch.optim.SGD([p], lr=0.1)).pc_backward([(p * a).sum(), (p * b).sum()])
        results.append(p.grad)
    projected = torch.stack(reference.pcgrad([a, b], [[1], [0]])).mean(0)
    assert torch.equal(results[0], (a + b) / 2)
    assert_near(results[1], projected, 1.0, TOLERANCES[torch.float16])
    assert (projected - (a + b).double() / 2).abs().max() > 0.1


@pytest.mark.parametrize("compat", MODES)
def test_schedulers_scale_the_step(compat: str | None) -> None:
    model, x, y = problem()
    with pytest.raises(TypeError, match="not an Optimizer"):
        torch.optim.lr_scheduler.StepLR(originals.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)), 1)  # type: ignore[arg-type]
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.pc_backward(model.losses(x, y))
    opt.step()
    scheduler.step()
    assert opt.optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("compat", MODES)
def test_a_scaler_skips_what_overflowed(compat: str | None) -> None:
    scaled, plain = [], []
    for seen, scale in ((scaled, True), (plain, False)):
        model, x, y = float64_problem()
        opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
        for step in range(3):
            random.seed(step)
            torch.manual_seed(step)
            losses = model.losses(x, y)
            if scale and step == 1:
                losses[1] = losses[1] * torch.inf
            opt.pc_backward([scaler.scale(loss) for loss in losses])
            if scale or step != 1:
                scaler.step(opt)
                scaler.update()
            seen.append(values(model))
    assert scaler.get_scale() == 1.0
    for a, e in zip(scaled, plain, strict=True):
        # Scales are powers of two, so they change no rounding.
        assert all(torch.equal(p, q) for p, q in zip(a, e, strict=True))


@pytest.mark.parametrize("compat", MODES)
def test_a_checkpoint_and_a_copy_go_on_to_the_same_bits(compat: str | None) -> None:
    def run(opt: PCGrad, model: MultiHead, x: Tensor, y: Tensor) -> list[Tensor]:
        random.seed(1)
        torch.manual_seed(1)
        for _ in range(3):
            opt.pc_backward(model.losses(x, y))
            opt.step()
        return values(model)

    model, x, y = problem()
    opt = PCGrad(torch.optim.Adam(model.parameters(), lr=0.01), compat=compat)
    run(opt, model, x, y)
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    copied_model, copied = copy.deepcopy((model, opt))
    expected = run(opt, model, x, y)

    other, _, _ = problem()
    resumed = PCGrad(torch.optim.Adam(other.parameters(), lr=0.5), compat=compat)
    resumed.load_state_dict(saved)
    other.load_state_dict(weights)
    results = [run(resumed, other, x, y), run(copied, copied_model, x, y)]
    assert all(torch.equal(a, e) for r in results for a, e in zip(r, expected, strict=True))
    assert repr(pickle.loads(pickle.dumps(opt))) == repr(opt) == repr(copied)
    torch.optim.Adam(other.parameters()).load_state_dict(saved)  # as a plain optimizer's


@pytest.mark.parametrize("compat", MODES)
def test_what_stood_in_grad_is_cleared(compat: str | None) -> None:
    results = []
    for before in (None, 3.0):
        model, x, y = problem()
        opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
        for p in model.parameters():
            p.grad = None if before is None else torch.full_like(p, before)
        random.seed(2)
        torch.manual_seed(2)
        opt.pc_backward(iter(model.losses(x, y)))
        results.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("compat", MODES)
def test_graphs_are_freed_unless_retained(compat: str | None) -> None:
    model, x, y = problem()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    losses = model.losses(x, y)
    opt.pc_backward(losses, retain_graph=True)
    opt.pc_backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        opt.pc_backward(losses)


@pytest.mark.parametrize("inner", [torch.optim.AdamW, gk.optim.AdamW])
@pytest.mark.parametrize("compat", MODES[1:])
def test_the_other_roads_to_a_step_are_theirs_too(compat: str, inner: Callable[..., torch.optim.Optimizer]) -> None:
    results = []
    for at_once in (False, True):
        model, x, y = float64_problem()
        shared, late = list(model.trunk.parameters()), list(model.heads.parameters())
        opt = PCGrad(inner(shared, lr=0.01), compat=compat)
        opt.add_param_group({"params": late})
        random.seed(4)
        for _ in range(3):
            if at_once:
                opt.update(model.losses(x, y))
            else:
                opt.pc_backward(model.losses(x, y))
                opt.step()
        results.append(values(model))
    expected, _, _ = float64_problem()
    reference_opt = peer(compat, "mean")(inner(expected.parameters(), lr=0.01))
    random.seed(4)
    for _ in range(3):
        reference_opt.pc_backward(expected.losses(x, y))
        reference_opt.step()
    for result in results:
        for a, e in zip(result, values(expected), strict=True):
            assert_near(a, e, 1.0, AFTER_TRAINING)


def test_bad_arguments_are_named_before_anything_changes() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"reduction must be 'sum' or 'mean', got 'max'"):
        PCGrad(inner, "max")
    with pytest.raises(ValueError, match=r"reduction must be .* got ''"):
        PCGrad(inner, "", compat="original")
    with pytest.raises(ValueError, match=r"compat must be one of .* got 'theirs'"):
        PCGrad(inner, compat="theirs")
    with pytest.raises(TypeError, match="optimizer must be"):
        PCGrad(model)  # type: ignore[arg-type]
    for compat in MODES[1:]:
        with pytest.raises(ValueError, match=r"objectives\[1\] must not be None"):
            PCGrad(inner, compat=compat).pc_backward([model.loss(0, x, y), None])
    assert all(g is None for g in gradients(model))
    PCGrad(inner).pc_backward([model.loss(0, x, y), None, lambda: model.loss(2, x, y)])  # ours knows absent tasks
    assert all((g is None) == (k in (6, 7)) for k, g in enumerate(gradients(model)))


@pytest.mark.parametrize("compat", MODES[1:])
def test_losses_in_one_tensor_are_taken_one_by_one_as_theirs_are(compat: str) -> None:
    """Through ``torch.stack`` every loss has gradients of 0 for other heads. Both originals count them as shared."""
    results = []
    for make in (peer(compat, "mean"), partial(PCGrad, compat=compat)):
        model, x, y = float64_problem()
        random.seed(3)
        make(torch.optim.SGD(model.parameters(), lr=0.01)).pc_backward(torch.stack(model.losses(x, y)))
        results.append(gradients(model))
    for a, e in zip(results[1], results[0], strict=True):
        assert a is not None
        assert e is not None
        assert_near(a, e, e.abs().max(), TOLERANCES[torch.float64])


@pytest.mark.parametrize("ambient", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_one_tensor_of_losses_without_heads_is_as_good_as_a_list(shape: tuple[int, ...], ambient: Any) -> None:
    pulls = torch.tensor([[1.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)
    expected = torch.stack(reference.pcgrad(list(pulls), [[1], [0]])).mean(0)
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = (pulls @ p).view(shape)
    with ambient():
        info = PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward(losses)
    assert info.losses.shape == (2,)
    assert_near(p.grad, expected, 1.0, TOLERANCES[torch.float64])


@pytest.mark.parametrize("compat", MODES)
def test_objectives_that_are_refused_leave_grad_as_it_was(compat: str | None) -> None:
    def fails() -> Tensor:
        raise ArithmeticError

    model, x, y = problem()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    opt.pc_backward(model.losses(x, y))
    grads, before = [p.grad for p in model.parameters()], gradients(model)
    losses = model.losses(x, y)
    refused = [None, 3, [], [None, None], {losses[0]}, {0: losses[0]}, [*losses, 0.5], [*losses, torch.ones(())]]
    for objectives in (
        *refused,
        losses[0],
        torch.ones(3),
        torch.ones(3, 2, requires_grad=True) * 2,
        [losses[0], fails],
    ):
        with pytest.raises((TypeError, ValueError, ArithmeticError)):
            opt.pc_backward(objectives)  # type: ignore[arg-type]
    for p, g, b in zip(model.parameters(), grads, before, strict=True):
        assert p.grad is g
        assert torch.equal(g, b)  # type: ignore[arg-type]


def test_init_group_clears_grad() -> None:
    """As pytorch_optimizer's class has it; the wrapped optimizer's own method of this name is another."""

    class Inner(torch.optim.SGD):
        def init_group(self, group: dict[str, Any]) -> None:
            raise AssertionError("this is the inner optimizer's")

    model, x, y = problem()
    opt = PCGrad(Inner(model.parameters(), lr=0.1))
    opt.pc_backward(model.losses(x, y))
    opt.init_group()
    assert all(g is None for g in gradients(model))


def test_every_public_name_of_pytorch_optimizers_class_that_is_no_part_of_its_algorithm_is_there() -> None:
    module = pytest.importorskip("pytorch_optimizer.optimizer.pcgrad")
    algorithm = {"set_grad", "retrieve_grad", "pack_grad", "project_conflicting"}
    names = {name for name in vars(module.PCGrad) if not name.startswith("_")} - algorithm
    assert {"init_group", "pc_backward"} <= names
    opt = PCGrad(torch.optim.SGD(problem()[0].parameters(), lr=0.1))
    assert [name for name in names if not hasattr(opt, name)] == []
