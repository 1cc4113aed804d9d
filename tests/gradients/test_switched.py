"""Callables that switch parameters' ``requires_grad``: every task trains what requires grad when its pass runs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.step import flat_rows
from tests.models import flat
from tests.tolerances import assert_near

T = 3
ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
Row = list[Tensor | None]


class Adapted(nn.Module):
    """A trunk, an adapter and a head for each task. A task's pass trains its own adapter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(6, 6) for _ in range(T))
        self.trunk = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(T))
        self.double()
        for adapter in self.adapters[1:]:
            adapter.requires_grad_(False)

    def switch(self, t: int) -> None:
        for s, adapter in enumerate(self.adapters):
            adapter.requires_grad_(s == t)

    def losses(self, x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
        def loss(t: int) -> Tensor:
            self.switch(t)
            h = sum(adapter(x) for adapter in self.adapters) + self.trunk(x).tanh()
            return (self.heads[t](h).squeeze(-1) - y[t]).square().mean()

        return [lambda t=t: loss(t) for t in range(T)]


@pytest.fixture(params=["flat", "in place"])
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep small task gradients in one matrix, and where autograd put them."""
    if request.param == "in place":
        monkeypatch.setattr(flat_rows, "LARGEST", 0)


pytestmark = pytest.mark.usefixtures("_rows")


def problem() -> tuple[Adapted, Tensor, Tensor]:
    torch.manual_seed(0)
    return Adapted(), torch.randn(8, 6).double(), 3 * torch.randn(T, 8).double()


def rows_of(losses: list[Callable[[], Tensor]], params: list[Tensor]) -> list[Row]:
    """Return the gradients that torch's own backward passes give, one after the other."""
    rows = []
    for loss in losses:
        for p in params:
            p.grad = None
        loss().backward()
        rows.append([None if p.grad is None else p.grad.clone() for p in params])
    for p in params:
        p.grad = None
    return rows


def combined(rows: list[Row], method: str, shared: list[int] | None = None) -> Row:
    """Return PCGrad of the parameters that are shared or that two tasks reach, by the reference; of others the sum."""
    columns = [[g for g in column if g is not None] for column in zip(*rows, strict=True)]
    shared = [k for k, column in enumerate(columns) if len(column) > 1] if shared is None else shared
    results = [sum(column) if column else None for column in columns]
    if method == "pcgrad":
        like = [columns[k][0] for k in shared]
        vectors = [flat([row[k] for k in shared], like) for row in rows]
        update = reference.pcgrad_update(vectors, ORDER).split([g.numel() for g in like])
        for k, g, part in zip(shared, like, update, strict=True):
            results[k] = part.view_as(g)
    return results


def assert_grads(params: list[Tensor], expected: Row, times: float = 1.0) -> None:
    for p, g in zip(params, expected, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            assert_near(p.grad, times * g, g.abs().max() + 1e-3, 1e-12)  # float64, a few hundred terms


METHODS: dict[str, Callable[[], gk.Aggregator]] = {"pcgrad": lambda: gk.PCGrad(order=ORDER), "sum": gk.Sum}
each_method = pytest.mark.parametrize("method", METHODS)


def test_two_layers_that_take_turns() -> None:
    """A closed form: the gradient of a sum of outputs is the sum of the inputs."""
    a, b, x = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False), torch.randn(5, 3)

    def task(on: nn.Linear, off: nn.Linear) -> Tensor:
        on.requires_grad_(True)
        off.requires_grad_(False)
        return on(x).sum()

    for times in (1, 2):
        params = [*a.parameters(), *b.parameters()]
        gk.backward([lambda: task(a, b), lambda: task(b, a)], params, aggregator=gk.PCGrad())
        for layer in (a, b):
            assert torch.allclose(layer.weight.grad, times * x.sum(0, keepdim=True))
            assert layer.bias.grad.item() == 5 * times


@pytest.mark.parametrize("groups", ["model", "parameter", "module"])
@each_method
def test_each_task_trains_its_own_adapter(method: str, groups: str) -> None:
    model, x, y = problem()
    params = list(model.parameters())
    expected = combined(rows_of(model.losses(x, y), params), method if groups == "model" else "sum")
    for _ in range(2):  # the second step begins as the first one left it
        model.zero_grad()
        info = gk.backward(model.losses(x, y), model, aggregator=METHODS[method](), groups=groups)
        if groups == "model" or method == "sum":
            assert_grads(params, expected)
        else:
            names = [name if groups == "parameter" else name.rpartition(".")[0] for name, _ in model.named_parameters()]
            assert info.groups == tuple(dict.fromkeys(names))
            trunk = info.groups.index("trunk.weight" if groups == "parameter" else "trunk")
            assert info.gramian[trunk].abs().min() > 0
            assert info.gramian[: trunk - 1].abs().max() == 0  # adapters have one task each


def test_the_shared_parameters_may_be_named() -> None:
    """An adapter among them belongs to the dot products with zeros in place of the other tasks' gradients."""
    model, x, y = problem()
    params = list(model.parameters())
    rows = rows_of(model.losses(x, y), params)
    named = [*model.adapters.parameters(), *model.trunk.parameters()]
    expected = combined(rows, "pcgrad", list(range(len(named))))
    gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER), shared=named)
    assert_grads(params, expected)


@pytest.mark.parametrize("options", [{}, {"max_norm": 1e9}, {"memory": True}], ids=["plain", "measured", "memory"])
@each_method
def test_an_update(method: str, options: dict[str, Any]) -> None:
    ours, x, y = problem()
    theirs = copy.deepcopy(ours)
    memory = options.pop("memory", False) if "memory" in options else False
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(ours.parameters(), lr=0.1), METHODS[method](), memory=memory)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(2):
        opt.update(ours.losses(x, y), **options)
        expected = combined(rows_of(theirs.losses(x, y), list(theirs.parameters())), method)
        for p, g in zip(theirs.parameters(), expected, strict=True):
            p.grad = g
        plain.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_near(p.detach(), q.detach(), 1.0, 1e-10)  # float64, through two steps of Adam


@each_method
def test_micro_batches(method: str) -> None:
    """What the last callable has frozen again has its sums all the same."""
    model, x, y = problem()
    params = list(model.parameters())
    parts = [rows_of(model.losses(x[part], y[:, part]), params) for part in (slice(0, 4), slice(4, 8))]
    sums = [[None if a is None else a + b for a, b in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), METHODS[method]())
    with opt.accumulate():
        for part in (slice(0, 4), slice(4, 8)):
            opt.backward(model.losses(x[part], y[:, part]))
    assert_grads(params, combined(sums, method))


@pytest.mark.parametrize("batched", [False, True])
def test_heads_on_features(batched: bool) -> None:
    """The adapters follow the trunk, whose output all tasks take."""
    torch.manual_seed(0)
    trunk = nn.Linear(6, 6).double()
    adapters = nn.ModuleList(nn.Linear(6, 1).double().requires_grad_(t == 0) for t in range(T))
    params = [*trunk.parameters(), *adapters.parameters()]
    x = torch.randn(8, 6).double()

    def losses(h: Callable[[], Tensor]) -> list[Callable[[], Tensor]]:
        def loss(t: int) -> Tensor:
            for s, adapter in enumerate(adapters):
                adapter.requires_grad_(s == t)
            return (sum(adapter(h()) for adapter in adapters) - 2 * t).square().mean()

        return [lambda t=t: loss(t) for t in range(T)]

    expected = combined(rows_of(losses(lambda: trunk(x)), params), "pcgrad")
    h = trunk(x)
    gk.backward(losses(lambda: h), params, aggregator=gk.PCGrad(order=ORDER), features=h, batched=batched)
    assert_grads(params, expected)
    for p in params:
        p.grad = None
    h = trunk(x)
    with pytest.raises(
        ValueError, match=r"losses\[0\].* switched requires_grad of params\[2\]: leave features out, so that Sum"
    ):
        gk.backward(losses(lambda: h), params, aggregator=gk.Sum(), features=h)
    assert all(p.grad is None for p in params)


@each_method
def test_what_is_frozen_again_before_the_pass_gets_nothing(method: str) -> None:
    """As torch's own pass gives it nothing: it looks at the end of the callable, like ``loss().backward()``."""
    model, x, y = problem()

    @contextmanager
    def trained(t: int) -> Iterator[None]:
        model.switch(t)
        yield
        model.switch(-1)

    def loss(t: int) -> Tensor:
        with trained(t):
            return model.losses(x, y)[t]()

    params = list(model.parameters())
    losses = [lambda t=t: loss(t) for t in range(T)]
    expected = combined(rows_of(losses, params), method)
    model.switch(0)
    gk.backward(losses, params, aggregator=METHODS[method]())
    assert_grads(params, expected)
    assert all(p.grad is None for p in model.adapters.parameters())


@each_method
def test_a_loss_of_what_is_frozen_reaches_nothing(method: str) -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def freezes() -> Tensor:
        value = b.sum()
        b.requires_grad_(False)
        return value

    with pytest.raises(ValueError, match=r"losses\[1\] reaches no parameter"):
        gk.backward([lambda: (a * b).sum(), freezes], [a, b], aggregator=METHODS[method]())
    assert a.grad is b.grad is None


@each_method
def test_a_parameter_that_cannot_be_trained_is_refused_before_anything_is_written(method: str) -> None:
    a = nn.Parameter(torch.ones(2))
    odd = nn.Parameter(torch.ones(2).to(torch.float8_e5m2), requires_grad=False)
    expanded = nn.Parameter(torch.ones(2), requires_grad=False)
    expanded.grad = torch.ones(1).expand(2)

    def loss(p: Tensor) -> Tensor:
        return (a * p.requires_grad_(True).float()).sum()

    for p, error, message in (
        (odd, TypeError, r"params must be float32.*params\[1\] is torch.float8_e5m2"),
        (expanded, ValueError, r"\.grad of params\[1\]"),
    ):
        with pytest.raises(error, match=message):
            gk.backward([lambda: a.sum(), lambda p=p: loss(p)], [a, p], aggregator=METHODS[method]())
        assert a.grad is None
        p.requires_grad_(False)
