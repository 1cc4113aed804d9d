"""The costs of the ways: numbers of passes against hooks, sizes by hand, and which ways are refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import gradkern as gk
from gradkern.advice.cost import Cost
from gradkern.compat.pcgrad import PCGrad
from gradkern.ops.pytorch import chunks
from tests.models import MultiHead, problem


class Counted(torch.autograd.Function):
    """The identity, which counts how often its backward pass runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], place: int) -> Tensor:
        ctx.counts, ctx.place = counts, place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.counts[ctx.place] += 1
        return grad.clone(), None, None


def counted(model: MultiHead, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor, list[int]]:
    """Return losses, features, and the number of backward passes through the trunk and through each head."""
    counts = [0] * (1 + len(y))
    h = model.trunk[2](Counted.apply(model.trunk[:2](x), counts, 0))
    losses = []
    for t, (head, target) in enumerate(zip(model.heads, y, strict=True)):
        losses.append((Counted.apply(head(h), counts, t + 1).squeeze(-1) - target).square().mean())
    return losses, h, counts


def of(advice: gk.Advice) -> dict[str, Cost]:
    return {cost.name: cost for cost in advice.rows}


@pytest.mark.parametrize("method", [gk.PCGrad, gk.Sum, lambda: gk.Sum(report=True)])
@pytest.mark.parametrize("absent", [None, 1])
def test_passes_are_those_of_the_step(method: Callable[[], gk.Aggregator], absent: int | None) -> None:
    model, x, y = problem()

    def given() -> tuple[list[Tensor | None], Tensor, list[int]]:
        losses, h, counts = counted(model, x, y)
        return [None if t == absent else loss for t, loss in enumerate(losses)], h, counts

    losses, h, _ = given()
    advice = gk.advise(losses, model, aggregator=method(), features=h)
    assert len({cost.name for cost in advice.rows}) == len(advice.rows) == 8
    for cost in advice.rows:
        if cost.time is None:
            continue
        losses, h, counts = given()
        features = {"features": h} if cost.needs_features else {}
        gk.backward(losses, model, aggregator=method(), **features, **cost.arguments)
        of_heads = {n for t, n in enumerate(counts[1:]) if t != absent}
        assert (counts[0], of_heads) == (cost.trunk, {cost.heads}), cost.name


def test_callables_have_passes_of_their_own() -> None:
    model, x, y = problem()
    advice = gk.advise([lambda t=t: model.loss(t, x, y) for t in range(3)], model, aggregator=gk.PCGrad())
    costs = of(advice)
    assert (advice.plain_passes, costs["rows"].trunk, costs["rows"].heads) == (3, 3, 1)
    assert costs["rows"].status == "measured"
    first = model.loss(0, x, y)
    mixed = gk.advise([first, lambda: model.loss(1, x, y), None], model, aggregator=gk.PCGrad())
    assert (mixed.n_tasks, mixed.plain_passes) == (2, 2)


def test_callables_on_features() -> None:
    model, x, y = problem()
    h = model.trunk(x)
    losses = [lambda t=t: (model.heads[t](h).squeeze(-1) - y[t]).square().mean() for t in range(3)]
    advice = gk.advise(losses, model, aggregator=gk.PCGrad(), features=h)
    costs = of(advice)
    assert advice.plain_passes == 1
    assert costs["rows"].notes == ("callables that share features need features=h",)
    assert costs["rows, features=h"].status == costs["rows, features=h, batched"].status == "measured"
    assert advice.best is not None
    assert advice.best.needs_features
    gk.backward(losses, model, aggregator=gk.PCGrad(), features=h, **advice.best.arguments)


def test_ways_by_features_need_them() -> None:
    model, x, y = problem()
    advice = gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    refused = {name: cost for name, cost in of(advice).items() if cost.needs_features}
    assert set(refused) == {"rows, features=h", "rows, features=h, batched", "features"}
    for cost in refused.values():
        assert (cost.status, cost.time, cost.memory, cost.trunk, cost.heads) == ("refused", *[None] * 4)
        assert "needs features=h" in cost.notes[0]


class WithoutRule(torch.autograd.Function):
    """An operation whose backward pass looks at numbers, which no vectorized pass can do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if grad.sum().item() > 0 else grad.clone()


def test_a_trunk_without_rules_is_not_batched() -> None:
    model, x, _ = problem()
    h = WithoutRule.apply(model.trunk(x))
    losses = [head(h).square().mean() for head in model.heads]
    costs = of(gk.advise(losses, model, aggregator=gk.PCGrad(), features=h))
    assert costs["rows, features=h"].status == "measured"
    assert costs["rows, features=h, batched"].status == "refused"
    assert "features cannot be differentiated for all tasks together" in costs["rows, features=h, batched"].notes[0]


def test_memory_is_that_of_rows_or_of_factors() -> None:
    """One weight of n² numbers under T tasks, with two tokens of n numbers."""
    n, T = 1024, 4
    layer = nn.Linear(n, n, bias=False)
    h = layer(torch.randn(2, n))
    costs = of(gk.advise([(h * torch.randn(n)).sum() for _ in range(T)], layer, aggregator=gk.PCGrad()))
    memory = {name: cost.memory for name, cost in costs.items()}
    rows, kept = memory["rows"], memory["activations, kept"]
    assert rows is not None
    assert kept is not None
    P, small = 4 * n**2, 4 * 16 * T * n  # small tensors: a few of the T tasks' gradients of two tokens
    # T gradients, of which plain training has one, and the scratch memory of a Gramian of float32.
    assert (T - 1) * P <= rows <= (T - 1) * P + 4 * chunks.SCRATCH + small
    # One gradient, as in plain training, and a copy while it gets the layout of the weight.
    assert 0 <= kept <= P + small
    assert memory["activations"] == 0


def test_a_method_that_weighs_losses_has_no_surgery() -> None:
    model, x, y = problem()
    advice = gk.advise(model.losses(x, y), model, aggregator=gk.Sum())
    costs = of(advice)
    assert "no surgery" in costs["rows"].notes[0]
    assert advice.best is costs["rows"]
    assert all(cost.status == "refused" for name, cost in costs.items() if name != "rows")


@pytest.mark.parametrize("report", [False, True])
def test_a_loss_of_nothing_that_trains_is_refused_as_by_backward(report: bool) -> None:
    model, x, y = problem()
    losses = [*model.losses(x, y)[:2], torch.ones((), requires_grad=True) * 2]
    for method in (gk.Sum(report=report), gk.PCGrad()):
        with pytest.raises(ValueError, match=r"losses\[2\] reaches no parameter"):
            gk.advise(losses, model, aggregator=method)
        with pytest.raises(ValueError, match=r"losses\[2\] reaches no parameter"):
            gk.advise([*losses[:2], lambda: losses[2]], model, aggregator=method)


def test_features_that_a_loss_passes_by_are_refused_as_by_backward() -> None:
    model, x, _ = problem()
    h = model.trunk(x)
    losses = [head(h).mean() for head in model.heads]
    losses[1] = losses[1] + model.trunk[0].weight.sum()
    with pytest.raises(ValueError, match=r"losses\[1\] also reaches 1 of the params below features"):
        gk.advise(losses, model, aggregator=gk.PCGrad(), features=h)


def test_methods_of_two_batches_have_no_advice() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"aggregator MoDo\(.*\) needs a second batch"):
        gk.advise(model.losses(x, y), model, aggregator=gk.MoDo())


def test_parameters_without_numbers_have_no_advice() -> None:
    layer = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="params must have numbers for advise"):
        gk.advise([layer(torch.ones(2, device="meta")).sum()], layer, aggregator=gk.PCGrad())


def test_there_is_no_advice_within_accumulate() -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad())
    with opt.accumulate(), pytest.raises(RuntimeError, match=r"advise\(\) within accumulate\(\)"):
        opt.advise(model.losses(x, y))


def test_an_optimizer_advises_on_its_own_options() -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1),
        gk.MGDA(),
        groups="module",
        through="activations",
        finish="kept",
    )
    advice = opt.advise(model.losses(x, y))
    assert (advice.method, advice.n_tasks) == ("MGDA(normalize=None)", 3)
    assert "rows" in of(advice)


def test_one_task() -> None:
    model, x, y = problem(n_tasks=1)
    advice = gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert (of(advice)["rows"].trunk, advice.n_tasks) == (1, 1)
    assert str(advice).startswith("1 task by PCGrad")


def test_memory_is_not_told_while_a_profiler_runs() -> None:
    model, x, y = problem()
    with profile(activities=[ProfilerActivity.CPU]):
        advice = gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert of(advice)["rows"].memory is None
    assert of(advice)["rows"].time is not None
    assert advice.best is not None
    assert str(advice)


def test_out_of_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("gradkern.advice.trial.rehearse", full)
    model, x, y = problem()
    advice = gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad())
    assert of(advice)["rows"].notes == ("out of memory",)
    assert advice.best is None
    assert "No exact way fits into the memory of the device." in str(advice)


@pytest.mark.parametrize(
    ("options", "refused", "reason"),
    [
        ({"aggregator": gk.GradDrop()}, {"backward", "kept"}, "looks at entries of the task gradients"),
        ({"aggregator": gk.MoCo()}, {"backward", "kept"}, "keeps running means"),
        ({"suppression": gk.Suppression(0.5, scope="all")}, {"backward", "kept"}, "whose mask needs entries"),
        ({"suppression": gk.Suppression(0.5)}, {"backward"}, "masks nothing"),
        ({"groups": "parameter"}, {"backward"}, "one weight for each task"),
    ],
)
def test_the_reason_of_a_refusal_is_that_of_the_step(options: dict[str, Any], refused: set[str], reason: str) -> None:
    model, x, y = problem()
    costs = of(gk.advise(model.losses(x, y), model, **{"aggregator": gk.PCGrad()} | options))
    assert costs["rows"].time is not None
    for name, finish in (("activations", "backward"), ("activations, kept", "kept")):
        assert (costs[name].status == "refused") == (finish in refused)
        if finish in refused:
            assert reason in costs[name].notes[0]


def test_memory_of_an_optimizer_and_callables_refuse_activations() -> None:
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), memory=True)
    assert "memory=True" in of(opt.advise(model.losses(x, y)))["activations"].notes[0]
    losses = [lambda t=t: model.loss(t, x, y) for t in range(3)]
    notes = of(gk.advise(losses, model, aggregator=gk.PCGrad()))["activations, kept"].notes
    assert "losses that are callables" in notes[0]


@pytest.mark.parametrize("compat", ["original", "pytorch_optimizer"])
def test_pcgrad_as_others_write_it_goes_by_rows(compat: str) -> None:
    model, x, y = problem()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    before = random.getstate()
    advice = opt.advise(model.losses(x, y))
    assert random.getstate() == before
    assert {cost.name for cost in advice.rows if cost.time is not None} == {"rows"}
    for through in ("activations", "features"):
        with pytest.raises(ValueError, match=f"through='{through}' has no rows, which compat='{compat}' combines"):
            opt.backward(model.losses(x, y), features=None, through=through)


def test_the_arguments_of_every_way_are_those_of_a_step() -> None:
    model, x, y = problem()
    for cost in gk.advise(model.losses(x, y), model, aggregator=gk.PCGrad(), features=None).rows:
        if cost.time is not None:
            gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), **cost.arguments)
