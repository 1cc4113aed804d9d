"""Steps by methods that work entry by entry: what they combine, and what goes with them."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import assert_near

NEAR = 1e-5
"""float32, of sums of three terms."""
METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "graddrop": lambda: gk.GradDrop(seed=11),
    "leak": lambda: gk.GradDrop([0.1, 0.0, 0.5], seed=11),
    "median": lambda: gk.TrimmedMean(1),
}
each_method = pytest.mark.parametrize("name", METHODS)


def positions(params: Sequence[Tensor]) -> Tensor:
    """The positions of the parameters' entries in the stream: each parameter begins at a multiple of 4."""
    firsts = reference.first_units([p.numel() for p in params], 1)
    return torch.cat([first + torch.arange(p.numel()) for first, p in zip(firsts, params, strict=True)])


def expected(name: str, rows: Sequence[Tensor], params: Sequence[Tensor], step: int) -> Tensor:
    """The reference's update of float32 rows, which decide on signs as they are."""
    single = [row.float() for row in rows]
    if name == "median":
        return reference.trimmed_mean(single, 1)
    leak = [0.1, 0.0, 0.5][: len(rows)] if name == "leak" else 0.0
    return reference.graddrop(single, leak, 11, step, positions(params))


def gathered(model: MultiHead, losses: Sequence[Tensor]) -> tuple[list[nn.Parameter], list[Tensor], Tensor]:
    """The trunk's parameters, the tasks' gradients of them, and the lengths of their terms."""
    trunk = list(model.trunk.parameters())
    rows = [flat(g, trunk) for g in task_gradients(losses, trunk)]
    return trunk, rows, torch.stack(rows).abs().sum(0)


def optimizer(model: nn.Module, method: gk.Aggregator, **options: object) -> gk.SurgeryOptimizer:
    return gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.05), method, **options)


@pytest.mark.parametrize("groups", ["model", "parameter", "module"])
@each_method
def test_a_step_is_the_twins_whatever_the_groups(name: str, groups: str, back_end: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, METHODS[name](), groups=groups)
    for step in range(3):
        opt.zero_grad()
        losses = model.losses(x, y)
        trunk, rows, size = gathered(model, losses)
        heads = task_gradients(losses, list(model.heads.parameters()))
        info = opt.backward(losses)
        assert_near(flat([p.grad for p in trunk], trunk), expected(name, rows, trunk, step), size, NEAR)
        assert (info.gramian, info.weights, info.groups) == (None, None, None)
        assert torch.equal(info.losses, torch.stack(losses).detach())
        for k, p in enumerate(model.heads.parameters()):
            assert torch.equal(p.grad, next(g[k] for g in heads if g[k] is not None))
        opt.step()


@each_method
def test_an_absent_task_is_left_out(name: str, back_end: str) -> None:
    model, x, y = problem(4)
    losses = model.losses(x, y)
    trunk, rows, size = gathered(model, [losses[0], losses[1], losses[3]])
    method = gk.GradDrop([0.1, 0.0, 0.5], seed=11) if name == "leak" else METHODS[name]()
    gk.backward([losses[0], losses[1], None, losses[3]], model, aggregator=method, shared=model.trunk)
    assert_near(flat([p.grad for p in trunk], trunk), expected(name, rows, trunk, 0), size, NEAR)


def test_too_few_present_tasks_are_named_before_anything_changes() -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    with pytest.raises(ValueError, match=r"k must be below half of the number of tasks that have gradients, 2, got 1"):
        gk.backward([losses[0], None, losses[2]], model, aggregator=gk.TrimmedMean(1))
    assert all(p.grad is None for p in model.parameters())


@each_method
def test_remembered_gradients_decide_and_are_not_added(name: str, back_end: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, METHODS[name](), shared=model.trunk, memory=True)
    trunk = list(model.trunk.parameters())
    rows = [torch.zeros(sum(p.numel() for p in trunk), dtype=torch.float64) for _ in range(3)]
    for step, present in enumerate(([0], [0, 1, 2], [1], [0, 2])):
        opt.zero_grad()
        losses = [model.loss(t, x + step, y) if t in present else None for t in range(3)]
        there = [loss for loss in losses if loss is not None]
        for t, grads in zip(present, task_gradients(there, trunk), strict=True):
            rows[t] = flat(grads, trunk)
        single, added = [row.float() for row in rows], [t in present for t in range(3)]
        if name == "median":
            update = reference.trimmed_mean(single, 1, added)
        else:
            leak = [0.1, 0.0, 0.5] if name == "leak" else 0.0
            update = reference.graddrop(single, leak, 11, step, positions(trunk), added)
        opt.backward(losses)
        assert_near(flat([p.grad for p in trunk], trunk), update, torch.stack(rows).abs().sum(0), NEAR)
        opt.step()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("scope", ["update", "all"])
@each_method
def test_suppression_masks_the_update(name: str, scope: str, block: int, back_end: str) -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    trunk, rows, size = gathered(model, losses)
    suppression = gk.Suppression(0.4, block, scope, seed=11)  # GradDrop's own seed, from which it draws apart
    units = reference.first_units([p.numel() for p in model.parameters()], block)
    keep = torch.cat(
        [reference.kept(11, 0, 0.4, block, u, p.numel()) for u, p in zip(units, trunk, strict=False)]  # the trunk leads
    )
    info = gk.backward(losses, model, aggregator=METHODS[name](), suppression=suppression)
    update = torch.where(keep, expected(name, rows, trunk, 0), 0.0)
    found = flat([p.grad for p in trunk], trunk)
    assert_near(found, update, size, NEAR)
    assert not found[~keep].any()
    assert_near(info.kept, keep.double().mean(), 1.0, 1e-6)


@each_method
def test_a_gramian_is_there_for_conflict_lr_alone(name: str, back_end: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, METHODS[name](), conflict_lr=gk.ConflictLR("attenuate"))
    losses = model.losses(x, y)
    _, rows, _ = gathered(model, losses)
    info = opt.backward(losses)
    assert info.weights is None
    assert_near(info.gramian, reference.gramian(rows), torch.stack(rows).norm(dim=1).max() ** 2, 1e-5)
    assert_near(info.step_scale, torch.tensor(reference.step_scale(rows, "attenuate", "mean")), 1.0, 1e-5)
    assert "norm/0" in info.scalars()
    assert not any(tag.startswith("weight") for tag in info.scalars())


@pytest.mark.parametrize("inner", [gk.optim.AdamW, torch.optim.AdamW])
@each_method
def test_update_clips_the_norm_of_the_combination(name: str, inner: type[torch.optim.Optimizer]) -> None:
    model, x, y = problem()
    other = copy.deepcopy(model)
    opt = gk.SurgeryOptimizer(inner(model.parameters(), lr=0.1), METHODS[name]())
    info = opt.update(model.losses(x, y), max_norm=0.1)
    gk.backward(other.losses(x, y), other, aggregator=METHODS[name]())
    norm = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.optim.AdamW(other.parameters(), lr=0.1).step()
    assert_near(info.total_norm, norm, norm, NEAR)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_near(p.detach(), q.detach(), q.detach().abs() + 0.1, 1e-4)  # Adam divides by the gradient's own size


@each_method
def test_state_goes_on_where_it_was_saved(name: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, METHODS[name]())
    for _ in range(2):
        opt.update(model.losses(x, y))
    other = copy.deepcopy(model)
    made = gk.TrimmedMean(1) if name == "median" else gk.GradDrop(METHODS[name]().leak, seed=3)
    resumed = optimizer(other, made)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2):
        opt.update(model.losses(x, y))
        resumed.update(other.losses(x, y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_that_raises_takes_its_numbers_back() -> None:
    class Refuses(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise RuntimeError("refused")

    model, x, y = problem()
    method = gk.GradDrop(seed=11)
    before = copy.deepcopy(method.state_dict())
    opt = gk.SurgeryOptimizer(Refuses(model.parameters(), lr=0.1), method)
    with pytest.raises(RuntimeError, match="refused"):
        opt.update(model.losses(x, y))
    assert torch.equal(method.state_dict()["_stream"], before["_stream"])
    opt.backward(model.losses(x, y))
    assert method.state_dict()["_stream"][1] == before["_stream"][1] + 1


@each_method
def test_an_overflow_reaches_the_gradient_scaler(name: str) -> None:
    model, x, y = problem()
    before = copy.deepcopy(model.state_dict())
    opt = optimizer(model, METHODS[name]())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    losses = [scaler.scale(loss) for loss in model.losses(x, y)]
    losses[1] = losses[1] * torch.inf
    opt.update(losses, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


@each_method
def test_sparse_and_complex_and_mixed_parameters(name: str) -> None:
    """A sparse gradient is made dense, a complex one is pairs of numbers, and each dtype has a call of its own."""
    torch.manual_seed(1)
    table = nn.Embedding(20, 3, sparse=True)
    params = [table.weight, nn.Parameter(torch.randn(7, dtype=torch.cfloat)), nn.Parameter(torch.randn(5).double())]
    words = torch.randint(0, 20, (3, 8))

    def losses(weight: Tensor) -> list[Tensor]:
        scale = [torch.randn(7), torch.randn(5)]
        return [
            (nn.functional.embedding(w, weight, sparse=weight is table.weight) ** 3).sum()
            + (params[1] * (scale[0] + t) * 1j).real.pow(3).sum()
            + (params[2] * (scale[1] - t)).pow(3).sum()
            for t, w in enumerate(words)
        ]

    state = torch.get_rng_state()
    gk.backward(losses(table.weight), params, aggregator=METHODS[name]())
    torch.set_rng_state(state)
    dense = [table.weight.detach().clone().requires_grad_(), *params[1:]]
    grads = task_gradients(losses(dense[0]), dense)
    firsts = reference.first_units([60, 14, 5], 1)
    for k, (p, first) in enumerate(zip(params, firsts, strict=True)):
        rows = [torch.view_as_real(g[k]).flatten() if g[k].is_complex() else g[k].flatten() for g in grads]
        if name == "median":
            update = reference.trimmed_mean(rows, 1)
        else:
            leak = [0.1, 0.0, 0.5] if name == "leak" else 0.0
            update = reference.graddrop(rows, leak, 11, 0, first + torch.arange(len(rows[0])))
        assert p.grad.layout == torch.strided
        found = torch.view_as_real(p.grad).flatten() if p.grad.is_complex() else p.grad.flatten()
        assert_near(found, update, torch.stack(rows).double().abs().sum(0), NEAR)


@each_method
def test_sums_of_micro_batches(name: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, METHODS[name]())
    trunk, rows, size = gathered(model, model.losses(x, y))
    with opt.accumulate():
        for part in (slice(8), slice(8, 16)):
            opt.backward([loss / 2 for loss in model.losses(x[part], y[:, part])])
    found = flat([p.grad for p in trunk], trunk)
    near = (found - expected(name, rows, trunk, 0)).abs() <= NEAR * size
    assert near.all() or (name != "median" and near.float().mean() > 0.99)  # a sum's last bit may turn a coin


def test_one_call_of_one_operator_for_all_shared_parameters(triton_serves_the_cpu: list[str]) -> None:
    """No Gramian, no combination: T + 1 words for an entry, and on a GPU one launch."""
    for method, name in ((gk.GradDrop(seed=1), "graddrop"), (gk.TrimmedMean(1), "trimmed_mean")):
        model, x, y = problem()
        triton_serves_the_cpu.clear()
        gk.backward(model.losses(x, y), model, aggregator=method)
        assert triton_serves_the_cpu == [name]
