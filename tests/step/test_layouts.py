"""Autograd promises no layout. Every way a gradient can lie that is not its parameter's way, and every way it can be
held by somebody else, against torch's own sum of the same gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.gradients import aliasing as held
from tests.models import task_gradients

pytestmark = pytest.mark.usefixtures("back_end")


class Keep(torch.autograd.Function):
    """Hands out a gradient that the caller keeps and may change later."""

    kept: Tensor

    @staticmethod
    def forward(ctx: object, p: Tensor) -> Tensor:
        return p.sum()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return Keep.kept


def expanded(p: Tensor) -> Tensor:
    return p.sum()


def permuted(p: Tensor) -> Tensor:
    x = torch.arange(12.0).reshape(4, 3)
    return torch.einsum("ab,ca->bc", p, x).square().sum()


def transposed_use(p: Tensor) -> Tensor:
    return (p.T @ torch.arange(float(p.shape[0]))).square().sum()


def conv(p: Tensor) -> Tensor:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    return torch.conv2d(x, p).square().sum()


def negated(p: Tensor) -> Tensor:
    """The imaginary part of a conjugate: its gradient can carry torch's lazy minus sign."""
    return torch.view_as_complex(torch.stack((p, 2 * p), -1)).conj().imag.square().sum()


CASES: list[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ("expanded", (3, 5), expanded),
    ("permuted", (3, 4), permuted),
    ("transposed use", (6, 5), transposed_use),
    ("channels_last gradient of a contiguous weight", (4, 3, 3, 3), conv),
    ("negated", (7,), negated),
    ("scalar", (), lambda p: p.square()),
    ("empty", (0, 4), lambda p: p.sum() + 0.0),
]


@pytest.mark.parametrize(("shape", "use"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_any_gradient_layout_is_read_right(shape: tuple[int, ...], use: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    p, other = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3))

    def losses() -> list[Tensor]:
        torch.manual_seed(1)
        return [use(p) + other.sum(), 2.5 * use(p) - other.square().sum()]

    _check_sum(losses(), [p, other])


def test_the_cases_are_what_they_say() -> None:
    """Otherwise a torch that grows tidier would leave the tests above without meaning."""
    torch.manual_seed(0)
    strides = {}
    for name, shape, use in CASES:
        p = nn.Parameter(torch.randn(shape))
        (g,) = torch.autograd.grad(use(p), p)
        strides[name] = (g.stride(), p.stride())
    for name in ("expanded", "permuted", "channels_last gradient of a contiguous weight"):
        assert strides[name][0] != strides[name][1], name


def test_a_lazy_minus_sign_is_not_lost() -> None:
    p = nn.Parameter(torch.randn(4))
    minus = torch._neg_view(torch.ones(4))
    assert minus.is_neg()
    Keep.kept = minus
    gk.backward([Keep.apply(p), p.sum()], [p], aggregator=gk.PCGrad())
    assert torch.equal(p.grad, torch.zeros(4))  # exactly opposed gradients cancel


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_grad_takes_the_parameters_strides(memory_format: torch.memory_format) -> None:
    p = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=memory_format))
    _check_sum([conv(p), p.square().sum()], [p])
    assert p.grad.stride() == p.stride()


def test_a_parameter_with_gaps_gets_a_contiguous_grad_as_from_torch() -> None:
    p, q = (torch.randn(4, 6)[:, :3].requires_grad_() for _ in range(2))
    q.square().sum().backward()
    gk.backward([p.square().sum(), p.sum()], [p], aggregator=gk.PCGrad())
    assert p.grad.stride() == q.grad.stride()


def test_one_storage_for_two_parameters() -> None:
    """``pos + tok`` gives both embeddings the very same gradient tensor."""
    tok, pos = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 4))
    losses = [(tok + pos).square().sum(), (tok + pos).sum()]
    grads = task_gradients(losses, [tok, pos])
    assert grads[0][0].data_ptr() == grads[0][1].data_ptr()
    _check_sum(losses, [tok, pos])
    assert tok.grad.untyped_storage().data_ptr() != pos.grad.untyped_storage().data_ptr()


def test_one_storage_for_two_task_specific_parameters() -> None:
    a, b, shared = (nn.Parameter(torch.randn(5)) for _ in range(3))
    gk.backward([((a + b) * shared).sum(), shared.square().sum()], [a, b, shared], aggregator=gk.PCGrad())
    assert a.grad.untyped_storage().data_ptr() != b.grad.untyped_storage().data_ptr()
    a.grad.zero_()
    assert torch.equal(b.grad, shared.detach())


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("aggregator", [gk.PCGrad(order=[0, 1]), gk.Sum()])
def test_a_gradient_that_the_caller_holds_is_neither_changed_nor_aliased(
    aggregator: gk.Aggregator, specific: bool
) -> None:
    p, q = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    Keep.kept = torch.arange(6.0)
    second = q.sum() if specific else p.square().sum() + q.sum()
    losses = [lambda: Keep.apply(p) + q.sum(), lambda: second]
    gk.backward(losses, [p, q], aggregator=aggregator)
    assert torch.equal(Keep.kept, torch.arange(6.0))
    before = p.grad.clone()
    Keep.kept.fill_(99.0)
    assert torch.equal(p.grad, before)


@pytest.mark.parametrize("alias", [lambda b: b, lambda b: b.view(6), lambda b: b.detach()])
@pytest.mark.parametrize("aggregator", [gk.PCGrad(order=[0, 1]), gk.Sum()])
def test_a_buffer_that_a_function_fills_anew_in_each_pass(
    aggregator: gk.Aggregator, alias: Callable[[Tensor], Tensor]
) -> None:
    """By the time the rows are read, the first task's gradient is gone from it."""
    buffer = torch.empty(6)

    class Reuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: Tensor, factor: float) -> Tensor:
            ctx.factor = factor
            return factor * p.sum()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            buffer.fill_(ctx.factor)
            return alias(buffer), None

    p = nn.Parameter(torch.randn(6))
    gk.backward([lambda: Reuse.apply(p, 2.0), lambda: Reuse.apply(p, 5.0)], [p], aggregator=aggregator)
    assert torch.equal(p.grad, torch.full((6,), 7.0))


def test_autograds_own_gradients_are_not_copied() -> None:
    """Nothing of the usual model is copied before it is read."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 2),
    )
    fresh = torch.autograd.grad(model(torch.randn(2, 3, 5, 5)).square().sum(), list(model.parameters()))
    assert all(a is b for a, b in zip(held.copies(fresh), fresh, strict=True))


def test_a_hook_that_keeps_the_gradient_keeps_its_own() -> None:
    p = nn.Parameter(torch.randn(6))
    kept: list[Tensor] = []
    p.register_hook(kept.append)
    gk.backward([p.sum() * 2, p.square().sum()], [p], aggregator=gk.PCGrad())
    values = [g.clone() for g in kept]
    p.grad.fill_(7.0)
    assert len(kept) == 2
    assert all(torch.equal(g, v) for g, v in zip(kept, values, strict=True))


def _check_sum(losses: list[Tensor], params: list[Tensor]) -> None:
    """With weights of one and two, the result is what torch says about L_1 + 2 L_2, and M is of the true gradients."""

    class OneTwo(gk.Aggregator):
        def weights(self, M: Tensor) -> Tensor:
            return torch.tensor([1.0, 2.0]).expand(M.shape[:-1])

    grads = task_gradients(losses, params)
    rows = [torch.cat([g.reshape(-1).double() for g in row]) for row in grads]
    info = gk.backward(losses, params, aggregator=OneTwo())
    for k, p in enumerate(params):
        # One rounding each of a product and a sum.
        assert torch.allclose(p.grad, grads[0][k] + 2 * grads[1][k], rtol=1e-6, atol=1e-6)
    M = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    assert torch.allclose(info.gramian.double(), M, rtol=1e-5)
