"""Methods on running means in steps: as their twins on explicit vectors, and what their state does."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from tests.aggregators.history.states import METHODS, assert_same_state, each_method, states
from tests.models import flat, problem, task_gradients
from tests.tolerances import assert_near


def expected(name: str, steps: list[list[Tensor]], losses: list[list[float]]) -> list[Tensor]:
    if name == "dbmtl":
        return reference.dbmtl(steps, losses=losses)
    return getattr(reference, name)(steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_method
def test_steps_as_the_twin_that_keeps_the_vectors(name: str, dtype: torch.dtype, back_end: str) -> None:
    """Heads get their own gradients."""
    model, x, y = problem()
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    trunk = list(model.trunk.parameters())
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.02), METHODS[name]())
    steps, losses = [], []
    for k in range(5):
        values = model.losses(x + 0.1 * k, y)
        steps.append([flat(g, trunk) for g in task_gradients(values, trunk)])
        losses.append([value.item() for value in values])
        heads = [task_gradients([values[t]], list(head.parameters()))[0] for t, head in enumerate(model.heads)]
        opt.zero_grad()
        opt.backward(values)
        update = flat([p.grad for p in trunk], trunk)
        wanted = expected(name, steps, losses)[-1]
        size = max(g.norm() for g in steps[-1]) + wanted.norm()
        assert_near(update, wanted, size, 1e-4 if dtype == torch.float32 else 1e-10)
        for grads, head in zip(heads, model.heads, strict=True):
            assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), grads, strict=True))
        opt.step()


@each_method
def test_each_group_has_its_own_weights(name: str) -> None:
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    method, trunk = METHODS[name](), list(model.trunk.parameters())
    steps: list[list[list[Tensor | None]]] = []
    losses = []
    for k in range(3):
        values = model.losses(x + 0.1 * k, y)
        losses.append([value.item() for value in values])
        steps.append(task_gradients(values, trunk))
        model.zero_grad()
        gk.backward(values, model, aggregator=method, groups="parameter", shared=model.trunk)
    for k, p in enumerate(trunk):
        of_group = [[flat([row[k]], [p]) for row in step] for step in steps]
        wanted = expected(name, of_group, losses)[-1]
        assert_near(flat([p.grad], [p]), wanted, wanted.norm() + 1e-3, 1e-9)


@each_method
def test_the_fused_step_is_that_of_the_gradient(name: str) -> None:
    models = [problem()[0] for _ in range(2)]
    _, x, y = problem()
    opts = [gk.SurgeryOptimizer(gk.optim.AdamW(m.parameters(), lr=0.01), METHODS[name]()) for m in models]
    for k in range(4):
        opts[0].update(models[0].losses(x + k, y), max_norm=1.0)
        opts[1].backward(models[1].losses(x + k, y))
        nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        opts[1].step()
        opts[1].zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(a, b, 1.0, 1e-4)


@each_method
def test_a_step_that_raises_puts_the_means_back(name: str) -> None:
    model, x, y = problem()
    method = METHODS[name]()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters(), lr=0.01), method)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    for k in range(2):
        before = states(method)
        hook = opt.optimizer.register_step_pre_hook(broken)
        with pytest.raises(KeyboardInterrupt):
            opt.update(model.losses(x + k, y))
        hook.remove()
        assert_same_state(states(method), before)
        opt.update(model.losses(x + k, y))
        with pytest.raises(AssertionError):
            assert_same_state(states(method), before)


@each_method
def test_no_step_writes_into_the_means_of_an_earlier_one(name: str) -> None:
    model, x, y = problem()
    method = METHODS[name]()
    gk.backward(model.losses(x, y), model, aggregator=method)
    kept = method.state_dict()["means_float32"]
    numbers = kept.clone()
    for _ in range(2):
        gk.backward(model.losses(x, y), model, aggregator=method)
    assert torch.equal(kept, numbers)


@pytest.mark.parametrize("fused", [False, True])
@each_method
def test_an_overflow_shows_and_moves_nothing(name: str, fused: bool) -> None:
    """Also in the first step."""
    p = nn.Parameter(torch.ones(5))
    method = METHODS[name]()
    inner = gk.optim.AdamW([p], lr=0.1) if fused else torch.optim.SGD([p], lr=0.1)
    opt = gk.SurgeryOptimizer(inner, method)

    def losses(factor: float) -> list[Tensor]:
        return [scaler.scale((p * factor).square().sum()), scaler.scale((p - torch.arange(5.0)).square().sum())]

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for k in range(2):
        before, at = states(method).get("means_float32"), p.detach().clone()
        info = opt.update(losses(torch.inf), scaler=scaler)
        assert info.weights.isnan().all()
        assert torch.equal(p, at)
        after = method.state_dict().get("means_float32")
        if after is None:  # as before the first step, which the host knows to be skipped
            assert before is None
            assert not fused
        else:
            assert torch.equal(after, torch.zeros_like(after) if before is None else before)
        scaler.update()
        opt.update(losses(1.0), scaler=scaler)
        assert method.steps.tolist() == [1 + k, 1 + k]
        assert not torch.equal(p, at)
        scaler.update()


@each_method
def test_an_absent_tasks_mean_waits(name: str) -> None:
    model, x, y = problem()
    method = METHODS[name]()
    gk.backward(model.losses(x, y), model, aggregator=method)
    before = method.state_dict()["means_float32"].clone()
    info = gk.backward([model.loss(0, x, y), None, model.loss(2, x, y)], model, aggregator=method)
    moved = (method.state_dict()["means_float32"] != before).any(1)
    assert moved.tolist() == [True, False, True]
    assert method.steps.tolist() == [2, 1, 2]
    assert (info.weights[1] == 0) == (name != "mconfig")
    assert info.weights.isfinite().all()


@each_method
def test_one_task_alone_moves_what_is_known_to_be_shared_by_its_mean(name: str) -> None:
    """And a head is no part of the means."""
    model, x, y = problem()
    method = METHODS[name]()
    gk.backward(model.losses(x, y), model, aggregator=method)
    assert set(method.sizes["means_float32"]) == set(range(4))
    model.zero_grad()
    gk.backward([None, model.loss(1, x, y), None], model, aggregator=method)
    gradient = torch.autograd.grad(model.loss(1, x, y), model.trunk[0].weight)[0]
    assert not torch.allclose(model.trunk[0].weight.grad, gradient, rtol=1e-3)


@each_method
def test_parameters_of_several_kinds(name: str) -> None:
    """16 and 64 bits, transposed, sparse, complex, scalars, and one that one task does not reach."""
    torch.manual_seed(0)
    half = nn.Parameter(torch.randn(4).bfloat16())
    double = nn.Parameter(torch.randn(3, 2).double().T)
    table = nn.Embedding(5, 2, sparse=True)
    number = nn.Parameter(torch.randn((), dtype=torch.complex64))
    other = nn.Parameter(torch.randn(3))
    params = [half, double, table.weight, number, other]

    def losses(k: int) -> list[Tensor]:
        def loss(t: int) -> Tensor:
            of_table = table(torch.tensor([t, 2])).square().sum()
            own = (other - t).square().sum() if t < 2 else 0.0
            shifted = (half.float() - t - k).square().sum() + (double * (1 + t)).square().sum().float()
            return shifted + of_table + (number * (1 + t * 1j)).real.square() + own

        return [loss(t) for t in range(3)]

    method, steps, values = METHODS[name](), [], []
    for k in range(3):
        given = losses(k)
        values.append([value.item() for value in given])
        dense = [[_real(g) for g in row] for row in task_gradients(given, params)]
        steps.append(
            [torch.cat([_zeros(p) if g is None else g for g, p in zip(r, params, strict=True)]) for r in dense]
        )
        for p in params:
            p.grad = None
        gk.backward(given, params, aggregator=method)
    update = torch.cat([_real(p.grad) for p in params])
    wanted = expected(name, steps, values)[-1]
    assert_near(update, wanted, wanted.norm(), 1e-2)  # bfloat16 has two to three digits
    assert set(method.sizes) == {"means_bfloat16", "means_float64", "means_float32"}
    assert double.grad.stride() == double.stride()


def _real(g: Tensor | None) -> Tensor | None:
    if g is None:
        return None
    g = g.to_dense() if g.is_sparse else g
    return (torch.view_as_real(g) if g.is_complex() else g).reshape(-1).double()


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros(p.numel() * (2 if p.is_complex() else 1), dtype=torch.float64)


@each_method
def test_with_suppression_memory_and_micro_batches(name: str) -> None:
    model, x, y = problem()
    method = METHODS[name]()
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), method, suppression=gk.Suppression(0.5, seed=1), memory=True
    )
    opt.backward(model.losses(x, y))
    opt.backward([model.loss(0, x, y), None, model.loss(2, x, y)])
    assert method.steps.tolist() == [2, 1, 2]
    plain, whole = METHODS[name](), METHODS[name]()
    grads = []
    for made in (plain, whole):
        model, x, y = problem()
        opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), made)
        if made is plain:
            opt.backward(model.losses(x, y))
        else:
            with opt.accumulate():
                opt.backward([loss / 2 for loss in model.losses(x, y)])
                opt.backward([loss / 2 for loss in model.losses(x, y)])
        grads.append(flat([p.grad for p in model.trunk.parameters()], list(model.trunk.parameters())))
    assert_near(grads[0], grads[1], grads[0].norm(), 1e-4)


@each_method
def test_tasks_that_take_turns_are_warned_of_unless_their_means_take_part(name: str) -> None:
    p = nn.Parameter(torch.ones(2))
    turns = [[p.sum(), None], [None, p.square().sum()]]
    if name == "mconfig":
        method = METHODS[name]()
        for losses in turns:
            gk.backward(losses, [p], aggregator=method, shared=[p])
        return
    with pytest.warns(UserWarning, match="no surgery with one task"):
        gk.backward(turns[0], [p], aggregator=METHODS[name](), shared=[p])


@each_method
def test_a_result_is_differentiable_in_the_gradients_of_the_step(name: str) -> None:
    method = METHODS[name]()
    method(torch.randn(3, 9).double())
    J = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    d = method(J)
    (slope,) = torch.autograd.grad(d[0], J)
    assert (slope[:, 0] != 0).any()
    assert (slope[:, 1:] == 0).all()
    assert not method.state_dict()["means_float64"].requires_grad


@each_method
def test_nothing_is_read_and_nothing_is_kept_of_fake_steps(name: str) -> None:
    method = METHODS[name]()
    with FakeTensorMode():
        model, x, y = problem()
        gk.backward(model.losses(x, y), model, aggregator=method)
    assert method.steps is None
