"""Complex parameters: their gradients are pairs of real numbers, in every step and with every method."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.aggregators import Scalarization
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import ONE_BATCH
from tests.tolerances import assert_near

F64, C128 = torch.float64, torch.complex128
NEAR = 1e-10  # float64 on both sides

pytestmark = pytest.mark.usefixtures("back_end")
each_method = pytest.mark.parametrize("method", ONE_BATCH.values(), ids=list(ONE_BATCH))
ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


class Spectral(nn.Module):
    """A trunk of complex and real parameters, one of them transposed in memory, and a complex head for each task."""

    def __init__(self, dtype: torch.dtype = C128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ParameterList(
            [
                nn.Parameter(torch.randn(4, 3, dtype=dtype).T),
                nn.Parameter(torch.randn(3, dtype=dtype.to_real())),
                nn.Parameter(torch.randn((), dtype=dtype)),
            ]
        )
        self.heads = nn.ParameterList(nn.Parameter(torch.randn(3, dtype=dtype)) for _ in range(3))
        self.x = torch.randn(5, 4, dtype=dtype)
        self.y = 3 * torch.randn(3, 5, dtype=dtype)

    def features(self) -> Tensor:
        W, b, c = self.trunk
        return (self.x @ W.conj().mT) * c + b

    def loss(self, t: int, z: Tensor | None = None) -> Tensor:
        z = self.features() if z is None else z
        return (z @ self.heads[t] - self.y[t]).abs().square().mean()

    def losses(self, z: Tensor | None = None) -> list[Tensor]:
        return [self.loss(t, z) for t in range(3)]

    def rows(self, tasks: Sequence[int] = range(3)) -> list[Tensor]:
        """Each task's gradient of the trunk, from torch, as one vector of real numbers."""
        trunk = list(self.trunk)
        return [pairs(torch.autograd.grad(self.loss(t), trunk), trunk) for t in tasks]


def pairs(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return gradients as one vector of real numbers, each in the order of its parameter's memory."""
    parts = []
    for g, p in zip(grads, params, strict=True):
        in_memory = torch.empty_like(p, dtype=g.dtype).copy_(g)
        order = sorted(range(p.ndim), key=lambda d: -p.stride(d))
        in_memory = in_memory.permute(order)
        parts.append((torch.view_as_real(in_memory) if in_memory.is_complex() else in_memory).reshape(-1).double())
    return torch.cat(parts)


def trunk_grad(model: Spectral) -> Tensor:
    for p in model.trunk:
        assert p.grad.dtype == p.dtype
        assert p.grad.stride() == p.stride()
        assert p.grad._base is None
    return pairs([p.grad for p in model.trunk], list(model.trunk))


def assert_same_numbers(a: Tensor, b: Tensor, scale: float, tolerance: float = NEAR) -> None:
    assert a.dtype == b.dtype
    assert_near(torch.view_as_real(a + 0j), torch.view_as_real(b + 0j), scale, tolerance)


def assert_heads_have_their_own(model: Spectral) -> None:
    for t, head in enumerate(model.heads):
        (g,) = torch.autograd.grad(model.loss(t), [head])
        assert_same_numbers(head.grad, g, g.abs().max().item())


@each_method
def test_every_method_sees_pairs_of_real_numbers(method: Method) -> None:
    model = Spectral()
    rows = model.rows()
    made, losses = method.make(ORDER), model.losses()
    info = gk.backward(losses, model, aggregator=made)
    expected = method.expected([rows], ORDER, losses=[info.losses.tolist()] if made.needs_losses else None)[0]
    assert_near(trunk_grad(model), expected, sum(row.norm() for row in rows), NEAR)


def as_they_are(model: Spectral) -> None:
    gk.backward(model.losses(), model, aggregator=gk.PCGrad(order=ORDER))


def by_callables(model: Spectral) -> None:
    gk.backward([lambda t=t: model.loss(t) for t in range(3)], model, aggregator=gk.PCGrad(order=ORDER))


def by_features(model: Spectral) -> None:
    z = model.features()
    gk.backward(model.losses(z), model, aggregator=gk.PCGrad(order=ORDER), features=z)


def by_a_batched_pass(model: Spectral) -> None:
    z = model.features()
    gk.backward(model.losses(z), model, aggregator=gk.PCGrad(order=ORDER), features=z, batched=True)


def by_micro_batches(model: Spectral) -> None:
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.0), gk.PCGrad(order=ORDER))
    with opt.accumulate():
        for share in (0.25, 0.75):
            opt.backward([share * loss for loss in model.losses()])


def with_memory(model: Spectral) -> None:
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.0), gk.PCGrad(order=ORDER), memory=True)
    opt.backward(model.losses())


def on_top_of_a_grad(model: Spectral) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    as_they_are(model)


WAYS = [
    as_they_are,
    by_callables,
    by_features,
    by_a_batched_pass,
    by_micro_batches,
    with_memory,
    on_top_of_a_grad,
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_step(way: Callable[[Spectral], None]) -> None:
    model = Spectral()
    rows = model.rows()
    way(model)
    assert_near(trunk_grad(model), sum(reference.pcgrad(rows, ORDER)), sum(row.norm() for row in rows), NEAR)
    assert_heads_have_their_own(model)


@pytest.mark.parametrize("dtype", [torch.complex64, C128])
@pytest.mark.parametrize("callables", [False, True])
@pytest.mark.parametrize("method", [gk.Sum(), gk.Constant([0.5, -2.0, 0.25])], ids=["Sum", "Constant"])
def test_a_weighted_sum_is_torchs_own(method: Scalarization, callables: bool, dtype: torch.dtype) -> None:
    model, alone = Spectral(dtype), Spectral(dtype)
    weights = method.task_weights(3)
    for w, loss in zip(weights, alone.losses(), strict=True):
        (w * loss).backward()
    losses: list[Any] = [lambda t=t: model.loss(t) for t in range(3)] if callables else model.losses()
    gk.backward(losses, model, aggregator=method)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        scale = q.grad.abs().max().item()
        assert p.grad.stride() == p.stride()
        assert_same_numbers(p.grad, q.grad, scale, 1e-5 if dtype == torch.complex64 else NEAR)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_outside_of_shared_it_gets_the_plain_sum(chosen: int) -> None:
    model = Spectral()
    trunk = list(model.trunk)
    shared = trunk[chosen]
    rows = [pairs(torch.autograd.grad(model.loss(t), [shared]), [shared]) for t in range(3)]
    gk.backward(model.losses(), model, aggregator=gk.PCGrad(order=ORDER), shared=[shared])
    scale = sum(row.norm() for row in rows)
    assert_near(pairs([shared.grad], [shared]), sum(reference.pcgrad(rows, ORDER)), scale, NEAR)
    for p in (p for p in trunk if p is not shared):
        expected = sum(torch.autograd.grad(model.loss(t), [p])[0] for t in range(3))
        assert_near(
            torch.view_as_real(p.grad + 0j), torch.view_as_real(expected + 0j), expected.abs().max().item(), NEAR
        )


@pytest.mark.parametrize("groups", ["parameter", lambda name: name.endswith("0")])
def test_each_group_is_a_problem_of_its_own(groups: Any) -> None:
    model = Spectral()
    trunk = list(model.trunk)
    info = gk.backward(model.losses(), model, aggregator=gk.PCGrad(order=ORDER), groups=groups)
    for members in [[0], [1], [2]] if groups == "parameter" else [[0], [1, 2]]:
        params = [trunk[k] for k in members]
        rows = [pairs(torch.autograd.grad(model.loss(t), params), params) for t in range(3)]
        expected = sum(reference.pcgrad(rows, ORDER))
        assert_near(pairs([p.grad for p in params], params), expected, sum(row.norm() for row in rows), NEAR)
        M = reference.gramian(rows)
        assert min((given - M).abs().max() for given in info.gramian) < NEAR * M.abs().max()


@pytest.mark.parametrize("block", [1, 4])
def test_suppression_drops_real_and_imaginary_parts_by_themselves(block: int) -> None:
    model = Spectral()
    rows = model.rows()
    suppression = gk.Suppression(0.45, block, seed=11)
    gk.backward(model.losses(), model, aggregator=gk.PCGrad(order=ORDER), suppression=suppression)
    numels = [24, 3, 2, *[6] * 3]
    firsts = reference.first_units(numels, block)
    keep = torch.cat([reference.kept(11, 0, 0.45, block, f, n) for f, n in list(zip(firsts, numels, strict=True))[:3]])
    expected = reference.suppressed(rows, keep, "update", lambda given: reference.pcgrad(given, ORDER))
    assert_near(trunk_grad(model), expected, sum(row.norm() for row in rows), NEAR)
    assert_heads_have_their_own(model)


def test_an_absent_task_is_remembered_and_saved() -> None:
    saved: dict[str, Any] = {}
    twin = reference.Memory(3, len(Spectral().rows()[0]))
    for present in ([0, 1], [2], [1]):
        model = Spectral()
        opt = gk.SurgeryOptimizer(
            torch.optim.SGD(model.named_parameters(), lr=0.0), gk.PCGrad(order=ORDER), shared=model.trunk, memory=True
        )
        if saved:
            opt.load_state_dict(saved)
        rows = dict(zip(present, model.rows(present), strict=True))
        opt.backward([model.loss(t) if t in present else None for t in range(3)])
        expected = twin.step(rows, lambda given: reference.pcgrad(given, ORDER))
        assert_near(trunk_grad(model), expected, 1 + expected.norm(), NEAR)
        saved = copy.deepcopy(opt.state_dict())


def test_an_optimizer_of_torchs_steps_along_it() -> None:
    model, alone = Spectral(), Spectral()
    opt = gk.SurgeryOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1), gk.PCGrad(order=ORDER), conflict_lr=gk.ConflictLR()
    )
    inner = torch.optim.AdamW(alone.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        info = opt.backward(model.losses())
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = p.grad.clone()
            q.data.copy_(p.data)
        inner.param_groups[0]["lr"] = 0.1 * float(info.step_scale)
        opt.step()
        inner.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert_same_numbers(p.detach(), q.detach(), 1.0)


def test_our_adamw_names_the_remedy_and_changes_nothing() -> None:
    """A frozen parameter is accepted, as torch's AdamW accepts it, and refused if it is trained later."""
    message = r"complex128, which this AdamW does not step: torch\.optim\.AdamW does.*view_as"
    model = Spectral()
    with pytest.raises(TypeError, match=message):
        gk.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    trained = nn.Parameter(torch.ones(2))
    opt = gk.SurgeryOptimizer(gk.optim.AdamW([trained, *model.requires_grad_(False).parameters()]), gk.PCGrad())
    model.requires_grad_(True)
    with pytest.raises(TypeError, match=message):
        opt.update(model.losses())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


class RowSum(torch.autograd.Function):
    """The sum of a table's row, whose gradient is sparse. PyTorch's own embeddings are real."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.shape, ctx.row = table.shape, row
        return table[row].sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        values = g.expand(1, ctx.shape[1])
        return torch.sparse_coo_tensor([[ctx.row]], values, ctx.shape, check_invariants=True), None


def test_a_gradient_that_is_lazily_conjugated_or_sparse() -> None:
    p = nn.Parameter(torch.randn(3, dtype=C128))
    table = nn.Parameter(torch.randn(4, 2, dtype=C128))
    v = torch.randn(3, dtype=C128)

    def losses() -> list[Tensor]:
        row = RowSum.apply(table, 2)
        return [(p * v).sum().real + row.real, (p.conj() * v).sum().imag - row.real + row.imag]

    p.register_hook(lambda g: g.conj().resolve_conj().conj())
    params = [p, table]
    grads = [torch.autograd.grad(loss, params) for loss in losses()]
    assert grads[0][0].is_conj()
    assert grads[0][1].is_sparse
    rows = [torch.cat([torch.view_as_real(g.to_dense().resolve_conj()).reshape(-1) for g in row]) for row in grads]
    gk.backward(losses(), params, aggregator=gk.PCGrad())
    result = torch.cat([torch.view_as_real(x.grad).reshape(-1) for x in params])
    expected = sum(reference.pcgrad(rows, [[1], [0]]))
    assert_near(result, expected, sum(row.norm() for row in rows), NEAR)


def test_two_numbers_by_hand() -> None:
    """Gradients 1 + 0i and -1 + 1i are the vectors (1, 0) and (-1, 1), which PCGrad makes (.5, 1.5)."""
    p = nn.Parameter(torch.zeros((), dtype=torch.complex64))
    info = gk.backward([p.real, p.imag - p.real], [p], aggregator=gk.PCGrad())
    assert p.grad.item() == 0.5 + 1.5j
    assert info.gramian.tolist() == [[1.0, -1.0], [-1.0, 2.0]]
    assert info.norms.tolist() == pytest.approx([1.0, math.sqrt(2.0)])
