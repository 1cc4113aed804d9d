"""Where a step's results go: into gradients that nobody needs any more, and nowhere else."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.step import rows
from tests.tolerances import TOLERANCES, assert_near

memory = pytest.importorskip("bench.memory", reason="bench/ is in the checkout only")

N = 1 << 22
ROW = 4 * N
"""Bytes of one task gradient."""
SCRATCH = 6 << 20
"""What may come on top: the CPU's 2 MB of gathered columns, its running sums, and the 4 MB of a window of its mask."""

METHODS: dict[str, dict[str, Any]] = {
    "pcgrad": {"aggregator": gk.PCGrad()},
    "gradvac": {"aggregator": gk.GradVac(), "groups": "parameter"},
    "attention": {"aggregator": gk.GradAttention(subset=64)},
    "attention on its subset": {"aggregator": gk.GradAttention(subset=64, update="subset")},
    "suppression": {"aggregator": gk.PCGrad(), "suppression": gk.Suppression(0.5, block=128, scope="all")},
}


def losses_of(params: Sequence[Tensor], T: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """T losses and their gradients, which autograd puts into new memory."""
    factors = [[torch.randn_like(p) for p in params] for _ in range(T)]
    losses = [sum(((p * f).sum() for p, f in zip(params, row, strict=True)), torch.zeros(())) for row in factors]
    return losses, factors


@pytest.mark.parametrize("name", METHODS)
def test_a_step_takes_the_task_gradients_and_no_more(name: str) -> None:
    """From no ``.grad`` to ``.grad``, T = 3 rows are alive at the worst moment, one afterwards."""
    params = [nn.Parameter(torch.randn(N // 2)), nn.Parameter(torch.randn(N // 4, 2))]
    losses, _ = losses_of(params, 3)
    assert 3 * ROW <= memory.peak(lambda: gk.backward(losses, params, **METHODS[name]), "cpu") <= 3 * ROW + SCRATCH


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_an_update_takes_the_task_gradients_and_no_more(max_norm: float | None) -> None:
    """Once the moments are there: T = 3 rows, and no combined gradient, before or after."""
    params = [nn.Parameter(torch.randn(N // 2)), nn.Parameter(torch.randn(N // 4, 2))]
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(params), gk.PCGrad())
    opt.update(losses_of(params, 3)[0])
    losses, _ = losses_of(params, 3)
    assert 3 * ROW <= memory.peak(lambda: opt.update(losses, max_norm=max_norm), "cpu") <= 3 * ROW + SCRATCH
    assert all(p.grad is None for p in params)


def test_memory_needs_its_rows() -> None:
    """T rows that are remembered and one result."""
    params = [nn.Parameter(torch.randn(N))]
    losses, _ = losses_of(params, 3)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, 0.1), gk.PCGrad(), memory=True)
    assert 4 * ROW <= memory.peak(lambda: opt.backward(losses), "cpu") <= 4 * ROW + SCRATCH


@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_overwriting_changes_no_result(T: int, dtype: torch.dtype, device: torch.device) -> None:
    """Whichever row the result takes the place of, the first one or not, and with rows of weight 0 among them."""
    J = torch.randn(T, 300_000, device=device).to(dtype)
    w = torch.randn(1, T, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    w[0, T // 2] = 0.0
    expected = reference.combine(list(J.cpu()), w[0].tolist())
    for t in range(T):
        rows = [row.clone() for row in J]
        operators.combine_tensors(TaskGrads(rows, [0], 1), w, [rows[t]])
        assert_near(rows[t].cpu(), expected, expected.abs().max(), TOLERANCES[dtype])
        assert all(torch.equal(row, original) for i, (row, original) in enumerate(zip(rows, J, strict=True)) if i != t)


class Saved(torch.autograd.Function):
    """Hands out, as the gradient, the very tensor that it has saved for every backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:  # type: ignore[override]
        factor = torch.arange(1.0, 4.0)
        ctx.save_for_backward(factor)
        return (p * factor).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def test_what_a_graph_keeps_for_another_pass_is_not_overwritten() -> None:
    p = nn.Parameter(torch.randn(3))
    losses = [Saved.apply(p), (p * torch.tensor([-1.0, 0.0, 0.0])).sum()]
    expected = gk.PCGrad()(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]]))
    for _ in range(3):
        p.grad = None
        gk.backward(losses, [p], aggregator=gk.PCGrad(), retain_graph=True)
        assert torch.equal(p.grad, expected)


def test_one_tensor_as_the_gradient_of_two_parameters_is_not_overwritten() -> None:
    """``pos + tok``: autograd hands out one gradient for both."""
    pos, tok = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    a, b = torch.randn(4), torch.randn(4)
    gk.backward([((pos + tok) * a).sum(), ((pos + tok) * b).sum()], [pos, tok], aggregator=gk.PCGrad())
    assert torch.equal(pos.grad, tok.grad)
    assert pos.grad.data_ptr() != tok.grad.data_ptr()


def test_a_grad_keeps_no_larger_memory_alive() -> None:
    """A gradient that is a part of a larger tensor goes into memory of its own."""
    p, q = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1000))
    gk.backward([torch.cat((p, q)).square().sum(), torch.cat((p, q)).sum()], [p], aggregator=gk.PCGrad())
    assert p.grad.untyped_storage().nbytes() == p.grad.nbytes


def test_a_grad_is_no_view() -> None:
    """Autograd gives a Linear's weight the transpose of a product."""
    layer = nn.Linear(4, 3)
    out = layer(torch.randn(5, 4))
    gk.backward([out[:, 0].sum(), out[:, 1].square().sum()], layer, aggregator=gk.PCGrad())
    assert layer.weight.grad._base is None
    layer.weight.grad.detach_()  # raises for a view


def test_results_do_not_alias_what_a_hook_has_seen() -> None:
    p = nn.Parameter(torch.randn(5))
    seen: list[Tensor] = []
    p.register_hook(lambda g: seen.append(g))
    losses, factors = losses_of([p], 2)
    gk.backward(losses, [p], aggregator=gk.PCGrad())
    assert [g.tolist() for g in seen] == [row[0].tolist() for row in factors]


def test_a_heads_gradient_that_is_needed_elsewhere_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Tensor] = []
    owned = rows.owned
    monkeypatch.setattr(rows, "owned", lambda g, p: copied.append(p) or owned(g, p))
    shared, heads = nn.Parameter(torch.ones(4)), [nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = gk.SurgeryOptimizer(torch.optim.SGD([shared, *heads], 0.1), gk.PCGrad(), memory=True)
    opt.backward([(shared * head).sum() for head in heads])
    assert [id(p) for p in copied] == [id(head) for head in heads]
