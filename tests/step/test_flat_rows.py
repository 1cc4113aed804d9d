"""The rows of a small model as matrices: their blocks, their bits, and what becomes of unshared parameters."""

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.gradients.layouts import layouts_of
from gradkern.gradients.plan import arranged
from gradkern.ops.pytorch.chunks import LINE, cut
from gradkern.step import flat_rows
from gradkern.step.flat_rows import FlatRows, flattened
from tests.models import problem, task_gradients
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_parameter", [False, True])
def test_blocks_are_cut_evenly_and_start_at_cache_lines(dtype: torch.dtype, by_parameter: bool) -> None:
    """Such blocks take the shortest way to a Gramian. Missing gradients and added columns are zeros."""
    sizes = (5, 0, 4099, 1, 2048 * 3 + 1)
    params = [nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    rows = [[torch.randn_like(p) for p in params] for _ in range(3)]
    rows[1][2] = None
    layouts = layouts_of(params)
    flat = [flattened(row, layouts) for row in rows]
    groups = tuple(range(5)) if by_parameter else (0,) * 5
    arrangement = arranged(layouts, tuple(one.reach for one in flat), groups, len(set(groups)), None, None)
    found = FlatRows(params, [one.vector for one in flat], arrangement).blocks
    members = [[k] for k in range(5)] if by_parameter else [range(5)]
    assert len(found) == len(members)
    for block, of_group in zip(found, members, strict=True):
        assert block.data_ptr() % LINE == 0
        assert block.is_contiguous()
        assert cut(*block.shape, block.itemsize).rest == 0
        for row, values in zip(rows, block, strict=True):
            parts = [torch.zeros_like(params[k]) if row[k] is None else row[k] for k in of_group]
            expected = torch.cat(parts)
            assert torch.equal(values[: len(expected)], expected)
            assert not values[len(expected) :].any()


@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("n_tasks", [2, 3, 9])
def test_the_number_of_threads_changes_no_bit(n_tasks: int, groups: str) -> None:
    torch.manual_seed(0)
    sizes = ((50, 50), (50,), (3000,), (97, 31), (1,))
    params = [nn.Parameter(torch.randn(s)) for s in sizes]
    factors = [[torch.randn(s) for s in sizes] for _ in range(n_tasks)]
    order = [list(range(n_tasks))] * n_tasks
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            losses = [sum((p * f).sum() for p, f in zip(params, row, strict=True)) for row in factors]
            for p in params:
                p.grad = None
            info = gk.backward(losses, params, aggregator=gk.PCGrad(order=order), groups=groups)
            results.append([info.gramian, info.weights, *(p.grad for p in params)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_heads_get_their_gradient_unchanged_and_named_parameters_the_sum() -> None:
    model, x, y = problem()
    heads, trunk = list(model.heads.parameters()), list(model.trunk.parameters())
    rows = task_gradients(model.losses(x, y), heads)
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
    own: list[Tensor] = [next(row[k] for row in rows if row[k] is not None) for k in range(len(heads))]
    assert all(torch.equal(p.grad, g) for p, g in zip(heads, own, strict=True))
    # All but the first two are unshared by name. Then each of them gets the sum, which is exact for one task.
    model.zero_grad()
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), shared=trunk[:2])
    assert all(torch.equal(p.grad, g) for p, g in zip(heads, own, strict=True))
    for p, column in zip(trunk[2:], zip(*task_gradients(model.losses(x, y), trunk[2:]), strict=True), strict=True):
        total = sum(g.double() for g in column)
        # Three terms are added in float32: two roundings.
        assert (p.grad - total).abs().max() <= 2 * 2**-24 * sum(g.abs().double() for g in column).max()


def test_larger_models_and_other_steps_keep_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem()
    made: list[FlatRows] = []
    init = FlatRows.__init__
    monkeypatch.setattr(
        FlatRows, "__init__", lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1]
    )
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert len(made) == 1
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), suppression=gk.Suppression(0.5))
    gk.backward(model.losses(x, y), model, aggregator=gk.GradAttention(subset=8))
    gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), 0.1), gk.PCGrad(), memory=True).backward(model.losses(x, y))
    monkeypatch.setattr(flat_rows, "LARGEST", 3 * sum(p.numel() for p in model.parameters()) - 1)
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert len(made) == 1


def test_groups_that_alternate_get_their_own_results(back_end: str) -> None:
    """A group's parameters are neighbours in its matrix, but not among the parameters."""
    sizes = {"a.0": (3, 3), "b.0": (3,), "a.1": (1, 3), "b.1": (5,), "a.2": (2,)}
    factors = [{name: torch.randn(s) for name, s in sizes.items()} for _ in range(2)]
    for way in ("backward", "update"):
        params = {name: nn.Parameter(torch.randn(s)) for name, s in sizes.items()}
        before = {name: p.detach().clone() for name, p in params.items()}
        seen: list[int] = []
        opt = gk.SurgeryOptimizer(
            gk.optim.AdamW(list(params.items()), lr=0.1, weight_decay=0.0),
            gk.PCGrad(order=[0, 1]),
            groups=lambda name: name[0],
        )
        losses = [sum((params[n] * f).sum() for n, f in of_task.items()) for of_task in factors]
        if way == "backward":
            for k, p in enumerate(params.values()):
                p.register_post_accumulate_grad_hook(lambda p, k=k, seen=seen: seen.append(k))
        (opt.backward if way == "backward" else opt.update)(losses)
        for group in "ab":
            names = [name for name in sizes if name[0] == group]
            rows = [torch.cat([of_task[n].flatten() for n in names]) for of_task in factors]
            expected = reference.pcgrad_update(rows, [[0, 1], [0, 1]])
            parts = expected.split([before[n].numel() for n in names])
            for name, part in zip(names, parts, strict=True):
                p = params[name]
                if way == "backward":
                    assert_near(p.grad.flatten(), part, rows[0].norm() + rows[1].norm(), 3e-6)
                else:  # AdamW's first step is lr long, against the gradient
                    assert torch.equal((p.detach() - before[name]).flatten().sign(), -part.sign().float())
        assert seen == (list(range(5)) if way == "backward" else [])
