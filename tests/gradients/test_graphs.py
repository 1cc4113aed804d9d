"""Graphs, hooks and modules: what is freed when, what fires when, and modules with a state of their own."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from tests.models import flat, problem, task_gradients

METHODS = [gk.PCGrad(order=[0, 1, 2]), gk.Sum()]


class Watched(torch.autograd.Function):
    """Passes its input on, and saves a tensor of its own whose life can be watched."""

    alive: list[weakref.ref[Tensor]]

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        saved = torch.ones(3)
        Watched.alive.append(weakref.ref(saved))
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].shape == (3,)
        return g


def n_alive() -> int:
    gc.collect()
    return sum(ref() is not None for ref in Watched.alive)


@pytest.mark.parametrize("method", METHODS)
def test_callables_keep_one_graph_alive_at_a_time(method: gk.Aggregator) -> None:
    model, x, y = problem()
    Watched.alive = []
    seen = []

    def task(t: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            seen.append(n_alive())
            return Watched.apply(model.loss(t, x, y))

        return loss

    gk.backward([task(t) for t in range(3)], model, aggregator=method)
    assert seen == [0, 0, 0]
    assert n_alive() == 0


def test_separate_graphs_are_freed_one_after_another() -> None:
    """The losses are still held by the caller; what they saved for backward is not."""
    model, x, y = problem()
    Watched.alive = []
    losses = [Watched.apply(model.loss(t, x, y)) for t in range(3)]
    assert n_alive() == 3
    seen = []
    model.trunk[0].weight.register_hook(lambda g: seen.append(n_alive()))
    gk.backward(losses, model, aggregator=gk.PCGrad())
    assert seen == [2, 1, 0]
    assert len(losses) == 3


def test_a_shared_graph_is_freed_by_its_last_user() -> None:
    """Tasks 0 and 2 share a trunk pass, task 1 has its own, which does not have to wait."""
    model, x, y = problem()
    Watched.alive = []
    own = Watched.apply(model.loss(1, x, y))
    h = Watched.apply(model.trunk(x))
    first, last = ((model.heads[t](h).squeeze(-1) - y[t]).square().mean() for t in (0, 2))
    seen = []
    model.trunk[0].weight.register_hook(lambda g: seen.append(n_alive()))
    gk.backward([first, own, last], model, aggregator=gk.PCGrad())
    assert seen == [2, 1, 0]


def test_tensor_hooks_fire_per_task() -> None:
    model, x, y = problem()
    p = model.trunk[0].weight
    seen: list[Tensor] = []
    p.register_hook(lambda g: seen.append(g.clone()))
    expected = [grads[0] for grads in task_gradients(model.losses(x, y), [p])]
    seen.clear()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_hook_that_changes_the_gradient_changes_the_row() -> None:
    model, x, y = problem()
    trunk = list(model.trunk.parameters())
    plain = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=[0, 1, 2]))
    for p in trunk:
        p.register_hook(lambda g: 2 * g)
    doubled = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=[0, 1, 2]))
    assert torch.equal(doubled.gramian, 4 * plain.gramian)


@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_post_accumulate_hooks_see_the_final_grad_once(method: gk.Aggregator, as_callables: bool) -> None:
    model, x, y = problem()

    def losses() -> list[object]:
        return [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)

    gk.backward(losses(), model, aggregator=method)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen: dict[Tensor, list[Tensor]] = {p: [] for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen[p].append(p.grad.clone()))
    gk.backward(losses(), model, aggregator=method)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert len(seen[p]) == 1
        assert torch.equal(seen[p][0], g)


def test_a_post_accumulate_hook_may_remove_itself() -> None:
    p = nn.Parameter(torch.ones(2))
    calls = []
    handle = p.register_post_accumulate_grad_hook(lambda p: (calls.append(1), handle.remove()))
    p.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    gk.backward([p.sum(), p.square().sum()], [p], aggregator=gk.PCGrad())
    assert calls == [1, 2]


def test_a_post_accumulate_hook_may_step_and_drop_the_gradient() -> None:
    """The optimizer-in-backward pattern."""
    model, x, y = problem()

    def step(p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.1)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in model.parameters()]
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad())
    for p, value in zip(model.parameters(), before, strict=True):
        assert p.grad is None
        assert not torch.equal(p, value)


def test_a_compiled_trunk_under_several_losses_says_what_to_do() -> None:
    """The compiler may let the first backward pass overwrite activations that the second needs; torch then raises this.

    Whether it does depends on the graph and on the compiler's caches, so here a Function raises in its place.
    """

    class Compiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            raise RuntimeError(
                "This backward function was compiled with non-empty donated buffers which requires create_graph=False "
                "and retain_graph=False."
            )

    p = nn.Parameter(torch.ones(3))
    h = Compiled.apply(p)
    with pytest.raises(
        ValueError, match=r"losses\[0\] shares a compiled graph.*Pass losses as callables.*donated_buffer = False and"
    ):
        gk.backward([h.sum(), h.square().sum()], [p], aggregator=gk.PCGrad())
    assert p.grad is None


class Normed(nn.Module):
    """BatchNorm and dropout: a forward pass that changes buffers and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))


def test_batch_norm_and_dropout_run_once_per_forward() -> None:
    torch.manual_seed(0)
    model = Normed()
    x = torch.randn(16, 6)

    def losses() -> list[Tensor]:
        torch.manual_seed(5)
        h = model.trunk(x)
        return [(head(h) - 3 * t).square().mean() for t, head in enumerate(model.heads)]

    norm = model.trunk[1]
    trunk = list(model.trunk.parameters())
    rows = task_gradients(losses(), trunk)
    mean, count = norm.running_mean.clone(), int(norm.num_batches_tracked)
    info = gk.backward(losses(), model, aggregator=gk.PCGrad())
    assert norm.num_batches_tracked == count + 1
    assert not torch.equal(norm.running_mean, mean)
    vectors = torch.stack([flat(row, trunk) for row in rows])
    assert torch.allclose(info.gramian.double(), vectors @ vectors.T, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("as_callables", [False, True])
def test_non_reentrant_checkpointing(method: gk.Aggregator, as_callables: bool) -> None:
    model, x, y = problem()

    def loss(t: int) -> Tensor:
        h = checkpoint(model.trunk, x, use_reentrant=False)
        return (model.heads[t](h).squeeze(-1) - y[t]).square().mean()

    gk.backward([lambda t=t: model.loss(t, x, y) for t in range(3)], model, aggregator=method)
    expected = flat([p.grad for p in model.parameters()], list(model.parameters()))
    model.zero_grad()
    if as_callables:
        losses = [lambda t=t: loss(t) for t in range(3)]
    else:
        h = checkpoint(model.trunk, x, use_reentrant=False)
        losses = [(head(h).squeeze(-1) - y[t]).square().mean() for t, head in enumerate(model.heads)]
    gk.backward(losses, model, aggregator=method)
    assert torch.allclose(flat([p.grad for p in model.parameters()], list(model.parameters())), expected, rtol=1e-5)


@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpointing_raises_and_says_what_to_do(method: gk.Aggregator, as_callables: bool) -> None:
    model, x, y = problem()
    x.requires_grad_()  # or torch itself trains nothing below the checkpoint

    def loss(t: int) -> Tensor:
        h = checkpoint(model.trunk, x, use_reentrant=True)
        return (model.heads[t](h).squeeze(-1) - y[t]).square().mean()

    losses = [(lambda t=t: loss(t)) if as_callables else loss(t) for t in range(3)]
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gk.backward(losses, model, aggregator=method)
    assert all(p.grad is None for p in model.parameters())


def test_a_post_accumulate_hook_that_raises_finds_the_step_done() -> None:
    model, x, y = problem()
    method, suppression = gk.GradVac(0.5), gk.Suppression(0.0, seed=1)

    def fail(p: Tensor) -> None:
        raise RuntimeError("a hook fails")

    model.trunk[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(RuntimeError, match="a hook fails"):
        gk.backward(model.losses(x, y), model, aggregator=method, suppression=suppression)
    assert all(p.grad is not None for p in model.parameters())
    assert suppression.state_dict()["step"] == 1
