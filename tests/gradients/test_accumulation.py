"""Gradient accumulation: task gradients add up over micro-batches, and surgery sees their sums."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": lambda: gk.PCGrad(order=ORDER),
    "gradvac": lambda: gk.GradVac(0.3, order=ORDER),
    "attention": lambda: gk.GradAttention(subset=8, width=4, generator=torch.Generator().manual_seed(1)),
    "sum": gk.Sum,
    "mean": gk.Mean,
}


def double_problem() -> tuple[MultiHead, Tensor, Tensor]:
    model, x, y = problem()
    return model.double(), x.double(), y.double()


def optimizer(model: nn.Module, method: gk.Aggregator, **options: object) -> gk.SurgeryOptimizer:
    return gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=0.05), method, **options)


def micro_batches(model: MultiHead, x: Tensor, y: Tensor, n: int = 4) -> list[list[Tensor]]:
    parts = zip(x.chunk(n), y.chunk(n, dim=1), strict=True)
    return [[loss / n for loss in model.losses(xs, ys)] for xs, ys in parts]


def in_parts(opt: gk.SurgeryOptimizer, model: MultiHead, x: Tensor, y: Tensor) -> gk.SurgeryInfo:
    with opt.accumulate() as total:
        for losses in micro_batches(model, x, y):
            opt.backward(losses)
    assert total.info is not None
    return total.info


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"groups": "module", "memory": True}, {"suppression": (0.4, 2)}])
def test_it_trains_as_one_big_batch(name: str, options: dict[str, object]) -> None:
    results = []
    for accumulated in (False, True):
        model, x, y = double_problem()
        given = {key: gk.Suppression(*value) if key == "suppression" else value for key, value in options.items()}
        opt = optimizer(model, METHODS[name](), **given)
        for step in range(5):
            shifted = x + 0.3 * step
            opt.zero_grad()
            info = in_parts(opt, model, shifted, y) if accumulated else opt.backward(model.losses(shifted, y))
            opt.step()
        results.append((flat(list(model.parameters()), list(model.parameters())), info))
    (whole, info), (parts, info_of_parts) = results
    # 1e-9: sums of 16 terms in another order, in float64, through five steps of Adam.
    assert_near(parts, whole, 1.0, 1e-9)
    assert_near(info_of_parts.losses, info.losses, 1.0, 1e-9)
    assert_near(info_of_parts.weights, info.weights, 1.0, 1e-7)
    if info.gramian is not None:
        assert_near(info_of_parts.gramian, info.gramian, info.gramian.abs().max(), 1e-9)


def test_surgery_is_of_the_sums() -> None:
    model, x, y = double_problem()
    trunk = list(model.trunk.parameters())
    parts = micro_batches(model, x, y)
    rows = sum(torch.stack([flat(g, trunk) for g in task_gradients(part, trunk)]) for part in parts)
    opt = optimizer(model, gk.PCGrad(order=ORDER))
    with opt.accumulate() as total:
        for part in parts:
            info = opt.backward(part)
            assert info.gramian is None
            assert not info.weights.any()
            assert torch.equal(info.losses, torch.stack(part))
            assert all(p.grad is None for p in model.parameters())
            assert total.info is None
    expected = torch.stack(reference.pcgrad(rows, ORDER)).sum(0)
    assert_near(flat([p.grad for p in trunk], trunk), expected, expected.norm(), 1e-12)  # float64


def test_what_stands_in_grad_is_added_to() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad(order=ORDER))
    opt.backward(model.losses(x, y))
    once = [p.grad.clone() for p in model.parameters()]
    with opt.accumulate():
        opt.backward(model.losses(x, y))
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)


@pytest.mark.parametrize("method", [gk.PCGrad(order=ORDER), gk.Sum()])
def test_a_task_may_be_absent_from_micro_batches(method: gk.Aggregator) -> None:
    model, x, y = double_problem()
    opt = optimizer(model, method)
    opt.backward([model.loss(0, x, y) + model.loss(0, 2 * x, y), model.loss(1, x, y), None])
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    opt.zero_grad()
    with opt.accumulate() as total:
        opt.backward([model.loss(0, x, y), None, None])
        opt.backward([model.loss(0, 2 * x, y), model.loss(1, x, y), None])
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            assert_near(p.grad, g, g.abs().max() + 1e-3, 1e-10)  # float64
    assert total.info.losses.isnan().tolist() == [False, False, True]


def test_gradients_that_share_memory_do_not_mix() -> None:
    """The gradient of a sum of two parameters is one tensor, which must not be added to twice."""
    a, b = (nn.Parameter(torch.ones(4)) for _ in range(2))
    x = torch.arange(4.0)
    opt = gk.SurgeryOptimizer(torch.optim.SGD([a, b], lr=1.0), gk.PCGrad())
    with opt.accumulate():
        for _ in range(3):
            opt.backward([((a + b) * x).sum(), (a + b).sum()])
    assert torch.equal(a.grad, 3 * (x + 1))
    assert torch.equal(b.grad, 3 * (x + 1))


def test_expanded_and_sparse_gradients() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    bias = nn.Parameter(torch.zeros(3, 2))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([*table.parameters(), bias], lr=1.0), gk.PCGrad())

    def losses(k: int) -> list[Tensor]:
        h = table(torch.tensor([k, k, 4])) + bias  # bias.sum() has a gradient with strides (0, 0)
        return [h.sum(), 2 * h.sum()]

    with opt.accumulate():
        for k in (0, 1):
            opt.backward(losses(k))
    assert torch.equal(bias.grad, torch.full((3, 2), 6.0))
    assert torch.equal(table.weight.grad.to_dense()[:, 0], torch.tensor([6.0, 6.0, 0, 0, 6.0]))


def test_an_exception_leaves_everything_as_it_was() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.GradVac(0.3))

    def interrupted() -> None:
        with opt.accumulate():
            opt.backward(model.losses(x, y))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert all(p.grad is None for p in model.parameters())
    assert not opt.aggregator.state_dict().get("targets", torch.zeros(1)).any()
    opt.backward(model.losses(x, y))  # no block is open any more
    assert all(p.grad is not None for p in model.parameters())


def test_a_micro_batch_that_fails_spoils_its_block() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad())

    def failing() -> Tensor:
        raise ZeroDivisionError

    def go_on(more: int) -> None:
        with opt.accumulate():
            with pytest.raises(ZeroDivisionError):
                opt.backward([lambda: model.loss(0, x, y), failing, None])
            for _ in range(more):
                opt.backward(model.losses(x, y))

    for more in (0, 1):
        with pytest.raises(RuntimeError, match="added up, and they are lost"):
            go_on(more)
    assert all(p.grad is None for p in model.parameters())


def test_what_comes_after_the_block_is_refused_within() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad())
    before = [p.clone() for p in model.parameters()]
    with opt.accumulate() as total:
        with pytest.raises(RuntimeError, match=r"accumulate\(\) within accumulate\(\)"), opt.accumulate():
            pass
        with pytest.raises(RuntimeError, match=r"step\(\) within accumulate\(\)"):
            opt.step()
        with pytest.raises(RuntimeError, match=r"update\(\) within accumulate\(\)"):
            opt.update(model.losses(x, y))
        with pytest.raises(RuntimeError, match=r"zero_grad\(\) within accumulate\(\)"):
            opt.zero_grad()
        with pytest.raises(RuntimeError, match=r"state_dict\(\) within accumulate\(\)"):
            opt.state_dict()
    assert total.info is None  # nothing has been added up
    with opt.accumulate():
        opt.backward(model.losses(x, y))
        with pytest.raises(ValueError, match="losses has 2 entries, and those before in this block had 3: pass None"):
            opt.backward(model.losses(x, y)[:2])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", [gk.PCGrad(), gk.Sum()])
def test_a_micro_batch_that_is_refused_leaves_the_others_alone(method: gk.Aggregator) -> None:
    """Nothing of it has been added, whether it was refused for its losses or for its features."""
    model, x, y = problem()
    opt = optimizer(model, method)
    with opt.accumulate():
        opt.backward(model.losses(x, y))
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="losses has 2 entries"):
            opt.backward(model.losses(x, y)[:2])
        with pytest.raises(TypeError, match="features must be"):
            opt.backward(model.losses(x, y), features=3)
        for p, g in zip(model.parameters(), before, strict=True):
            assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert all(p.grad is not None for p in model.parameters())


def test_conflict_lr_goes_by_the_sums() -> None:
    scales = []
    for accumulated in (False, True):
        model, x, y = double_problem()
        opt = optimizer(model, gk.Sum(), conflict_lr=gk.ConflictLR("attenuate"))
        info = in_parts(opt, model, x, y) if accumulated else opt.backward(model.losses(x, y))
        opt.step()
        scales.append(torch.cat([info.step_scale.reshape(1), flat(list(model.parameters()), list(model.parameters()))]))
    assert_near(scales[1], scales[0], 1.0, 1e-10)  # float64


def test_a_row_per_task_is_kept_and_no_more() -> None:
    """While a micro-batch runs there are T rows, and those of one pass; at the end the result takes a row's place."""
    memory = pytest.importorskip("bench.memory", reason="bench/ is in the checkout only")
    n = 1 << 22
    row = 4 * n
    w = nn.Parameter(torch.zeros(n))
    factors = [torch.randn(n) for _ in range(3)]
    opt = gk.SurgeryOptimizer(torch.optim.SGD([w], lr=1.0), gk.PCGrad())

    def run() -> None:
        with opt.accumulate():
            for _ in range(3):
                opt.backward([lambda f=f: w @ f for f in factors])

    # 6 MB: the CPU's scratch for Gramian and combination.
    assert 4 * row <= memory.peak(run, "cpu") <= 4 * row + (6 << 20)


@pytest.mark.parametrize("method", [gk.PCGrad(order=ORDER), gk.Sum()], ids=["PCGrad", "Sum"])
def test_what_is_frozen_within_the_block_gets_the_sums_from_before(method: gk.Aggregator) -> None:
    """As torch's ``.grad`` would stay. The rest of the model goes on."""
    model, x, y = problem()
    params = list(model.parameters())
    rows = task_gradients(model.losses(x, y), params)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), method)
    with opt.accumulate():
        opt.backward(model.losses(x, y))
        model.heads.requires_grad_(False)
        model.trunk[0].requires_grad_(False)
        opt.backward(model.losses(x, y))
    trunk, n = list(model.trunk.parameters()), 4
    sums = [[g if k < 2 else 2 * g for k, g in enumerate(row[:n])] for row in rows]
    vectors = [flat(row, trunk) for row in sums]
    expected = sum(vectors) if isinstance(method, gk.Sum) else reference.pcgrad_update(vectors, ORDER)
    assert_near(flat([p.grad for p in trunk], trunk), expected, expected.norm(), 1e-5)  # float32
    for k, p in enumerate(params[n:], n):
        assert torch.equal(p.grad, next(row[k] for row in rows if row[k] is not None))  # once


def test_a_method_may_become_a_scalarization_before_the_block_is_left() -> None:
    """The gradients are there by then, and it weighs them."""
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad())
    with opt.accumulate():
        opt.backward(model.losses(x, y))
        opt.aggregator = gk.Sum()
    expected = torch.autograd.grad(sum(model.losses(x, y)), list(model.parameters()))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_near(p.grad, g, g.abs().max(), TOLERANCES[torch.float32])
