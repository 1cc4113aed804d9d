"""One pass through a shared trunk: heads go back to the features first, and the trunk once per task or batched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from tests.gradients.test_graphs import Watched, n_alive
from tests.models import MultiHead, problem
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": lambda: gk.PCGrad(order=ORDER),
    "gradvac": lambda: gk.GradVac(0.3, order=ORDER),
    "sum": gk.Sum,
    "constant": lambda: gk.Constant([1.0, 2.0, -3.0]),
}


def heads_of(model: MultiHead, h: Tensor, y: Tensor) -> list[Tensor]:
    return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]


def grads_of(params: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in params.parameters()]


def assert_grads(model: nn.Module, expected: list[Tensor | None]) -> None:
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            # float64, some hundred terms; batched, matrix products add up in another order.
            assert_near(p.grad, g, g.abs().max() + 1e-3, 1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_as_without_features(name: str, as_callables: bool, batched: bool, device: torch.device) -> None:
    model, x, y = problem(device=device)
    model, x, y = model.double(), x.double(), y.double()
    plain = gk.backward(model.losses(x, y), model, aggregator=METHODS[name](), groups="module")
    expected = grads_of(model)
    model.zero_grad()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    if as_callables:
        losses = [lambda t=t: heads_of(model, h, y)[t] for t in range(3)]
    info = gk.backward(losses, model, aggregator=METHODS[name](), groups="module", features=h, batched=batched)
    assert_grads(model, expected)
    assert torch.equal(info.losses, plain.losses)
    assert_near(info.weights, plain.weights, plain.weights.abs().max(), 1e-9)


@pytest.mark.parametrize("batched", [False, True])
def test_one_pass_through_the_trunk_per_task_or_for_all(batched: bool) -> None:
    model, x, y = problem()
    seen = []

    class Counted(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            seen.append(g.shape)
            return g

    h = model.trunk[2](Counted.apply(model.trunk[:2](x)))
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=batched)
    assert len(seen) == (1 if batched else 3)


@pytest.mark.parametrize("batched", [False, True])
def test_tasks_that_reach_some_features_only(batched: bool) -> None:
    """Two trunks; the first task uses one, the second both, the third the other, a fourth none at all."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5).double(), nn.Linear(4, 5).double()
    alone = nn.Parameter(torch.ones(5, dtype=torch.float64))
    params = [*a.parameters(), *b.parameters(), alone]
    x = torch.randn(8, 4, dtype=torch.float64)

    def losses(f: Tensor, g: Tensor) -> list[Tensor]:
        return [f.square().mean(), (f - 2 * g).square().mean(), (-g - 1).square().mean(), (alone * alone).sum()]

    plain = gk.backward(losses(a(x), b(x)), params, aggregator=gk.PCGrad(order=[0, 1, 2, 3]))
    expected = [p.grad.clone() for p in params]
    for p in params:
        p.grad = None
    f, g = a(x), b(x)
    order = [3, 1, 0, 2]  # tasks that reach the same go together, wherever they stand
    put = [losses(f, g)[t] for t in order]
    inverse = [order.index(t) for t in range(4)]
    info = gk.backward(put, params, aggregator=gk.PCGrad(order=inverse), features=[f, g], batched=batched)
    for p, e in zip(params, expected, strict=True):
        assert_near(p.grad, e, e.abs().max(), 1e-12)  # float64
    assert_near(info.gramian[inverse][:, inverse], plain.gramian, plain.gramian.abs().max(), 1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_one_task_alone_whose_gradients_share_memory(batched: bool) -> None:
    """Autograd gives both terms of a sum one gradient, which is not to be written to twice, nor to be two ``.grad``."""
    a, b = (nn.Parameter(torch.arange(3.0) + k) for k in range(2))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([a, b]), gk.PCGrad())
    with opt.accumulate():
        for _ in range(3):
            h = a + b
            opt.backward([h.sum(), None], features=h, batched=batched)
    assert a.grad.tolist() == b.grad.tolist() == [3.0, 3.0, 3.0]
    a.grad.zero_()
    assert b.grad.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("batched", [False, True])
def test_a_hook_that_gives_all_tasks_the_same(batched: bool) -> None:
    a = nn.Parameter(torch.arange(3.0))
    a.register_hook(lambda g: torch.ones(3))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([a]), gk.PCGrad())
    with opt.accumulate():
        for _ in range(3):
            h = 2 * a
            opt.backward([h.sum(), h.square().sum()], features=h, batched=batched)
    assert a.grad.tolist() == [6.0, 6.0, 6.0]  # ones of two tasks, which agree, three times


def test_an_absent_task() -> None:
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    losses = model.losses(x, y)
    gk.backward([losses[0], None, losses[2]], model, aggregator=gk.PCGrad(order=ORDER))
    expected = grads_of(model)
    model.zero_grad()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    gk.backward([losses[0], None, losses[2]], model, aggregator=gk.PCGrad(order=ORDER), features=h, batched=True)
    assert_grads(model, expected)


def test_a_frozen_trunk_has_no_pass() -> None:
    model, x, y = problem()
    model.trunk.requires_grad_(False)
    h = model.trunk(x)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h)
    expected = torch.autograd.grad(sum(heads_of(model, model.trunk(x), y)), list(model.heads.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.heads.parameters(), expected, strict=True))
    assert all(p.grad is None for p in model.trunk.parameters())


def test_the_graph_of_each_head_is_freed_before_the_next_runs() -> None:
    model, x, y = problem()
    Watched.alive = []
    h = model.trunk(x)
    seen = []

    def head(t: int) -> Tensor:
        seen.append(n_alive())
        return Watched.apply((model.heads[t](h).squeeze(-1) - y[t]).square().mean())

    gk.backward([lambda t=t: head(t) for t in range(3)], model, aggregator=gk.PCGrad(), features=h)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("batched", [False, True])
def test_the_trunks_graph_is_freed_unless_it_is_to_be_kept(batched: bool) -> None:
    model, x, y = problem()
    h = model.trunk(x)
    losses = heads_of(model, h, y)
    for retain_graph in (True, False):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, batched=batched, retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time"):
        gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, batched=batched)


@pytest.mark.parametrize("batched", [False, True])
def test_optimizers_take_features(batched: bool) -> None:
    """In ``backward``, ``update`` and between micro-batches."""
    results = []
    for with_features in (False, True):
        model, x, y = problem()
        model, x, y = model.double(), x.double(), y.double()
        opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters(), lr=0.05), gk.PCGrad(order=ORDER))

        def given(x: Tensor, model: MultiHead = model, on: bool = with_features) -> tuple[list[Tensor], dict]:
            h = model.trunk(x)
            return heads_of(model, h, y), ({"features": h, "batched": batched} if on else {})  # noqa: B023

        for how in ("backward", "update", "accumulate"):
            losses, options = given(x)
            if how == "update":
                opt.update(losses, **options)
                continue
            if how == "backward":
                opt.backward(losses, **options)
            else:
                with opt.accumulate():
                    opt.backward(losses, **options)
                    losses, options = given(2 * x)
                    opt.backward(losses, **options)
            opt.step()
            opt.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert_near(b, a, 1.0, 1e-10)  # float64, through three steps of Adam


def test_checkpointed_trunk() -> None:
    model, x, y = problem()
    model, x, y = model.double(), x.double(), y.double()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    expected = grads_of(model)
    model.zero_grad()
    h = checkpoint(model.trunk, x, use_reentrant=False)
    gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(order=ORDER), features=h)
    assert_grads(model, expected)
    h = checkpoint(model.trunk, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match=r"features\[0\] runs .*use_reentrant=False"):
        gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h)


BAD = [
    ({"features": 3}, TypeError, "features must be a tensor or a sequence of tensors, got int"),
    ({"features": []}, ValueError, "features is empty"),
    ({"features": ["h"]}, TypeError, r"features\[0\] must be a tensor, got 'h'"),
    ({"batched": True}, ValueError, "batched=True needs features"),
    ({"features": torch.ones(2), "batched": "x"}, TypeError, "batched must be True or False, got 'x'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    model, x, y = problem()
    with pytest.raises(error, match=message):
        gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), **options)
    assert all(p.grad is None for p in model.parameters())


def test_features_that_are_not_all_that_the_tasks_share() -> None:
    model, x, y = problem()
    first = model.trunk[:2](x)
    h = model.trunk[2](first)
    losses = heads_of(model, h, y)

    def refused(features: object, message: str, losses: list[Tensor] = losses) -> None:
        with pytest.raises(ValueError, match=message):
            gk.backward(losses, model, aggregator=gk.PCGrad(), features=features, retain_graph=True)
        assert all(p.grad is None for p in model.parameters())

    refused([h, h], r"features\[1\] is given twice")
    refused([h, first], r"features\[0\] is computed from another of features")
    skipping = [losses[0], losses[1] + first.sum(), losses[2]]
    refused(h, r"losses\[1\] reaches 2 of the params below features past them", skipping)
    tied = [losses[0], losses[1], losses[2] + model.trunk[2].weight.sum()]
    refused(h, r"losses\[2\] reaches 1 of the params .*shape \(8, 10\): leave features out", tied)
    one, other = model.trunk(x).unbind(-1)[:2]  # two outputs of one node: what hangs at the other goes past
    refused(one, r"losses\[1\] reaches 4 of the params", [one.sum(), other.sum(), one.square().sum()])


@pytest.mark.parametrize("batched", [False, True])
def test_a_hook_on_features_is_refused(batched: bool) -> None:
    """It would run where a head's pass ends and where the trunk's begins, and halve a gradient twice."""
    model, x, y = problem()
    for hook in (lambda h: h.register_hook(lambda g: g / 2), torch.Tensor.retain_grad):
        h = model.trunk(x)
        hook(h)
        with pytest.raises(ValueError, match=r"features\[0\] has a hook or retain_grad\(\)"):
            gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h, batched=batched)
        assert all(p.grad is None for p in model.parameters())


def test_features_that_have_nothing_to_do_with_it_change_nothing() -> None:
    """Such as of an encoder that is frozen, whose input requires grad."""
    model, x, y = problem()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    unrelated = model.trunk(x).detach().requires_grad_()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), features=2 * unrelated)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_donated_buffer_is_explained() -> None:
    """Autograd's message of a compiled trunk, whose backward pass has overwritten what a second one needs."""

    class Donating(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            raise RuntimeError("This backward function was compiled with non-empty donated buffers")

    model, x, y = problem()
    h = Donating.apply(model.trunk(x))
    with pytest.raises(ValueError, match=r"losses\[0\] shares a compiled graph .*donated_buffer = False"):
        gk.backward(heads_of(model, h, y), model, aggregator=gk.PCGrad(), features=h)
