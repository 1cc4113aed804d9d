"""A step is right whatever changes before it: nothing that is remembered from earlier steps is out of date."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradkern as gk
from gradkern import reference
from gradkern.step import flat_rows
from tests.models import flat, task_gradients
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


class Model(nn.Module):
    """A trunk with a matrix, a convolution, an embedding and a scalar, and a head for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 3, 2)
        self.table = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.heads = nn.ModuleList(nn.Linear(8 + 3 + 4, 1) for _ in range(3))
        self.skips = [False] * 3
        """For each task whether it leaves out the convolution."""

    def features(self, t: int) -> Tensor:
        """Return the features of task t, (4, 15)."""
        dtype = self.linear.weight.dtype
        x = torch.linspace(-1, 1, 24, dtype=dtype).view(4, 6)
        image = torch.linspace(-2, 1, 4 * 2 * 9, dtype=dtype).view(4, 2, 3, 3)
        convolved = torch.zeros(4, 3, dtype=dtype) if self.skips[t] else self.conv(image).mean((2, 3))
        return torch.cat((self.linear(x).tanh() * self.scale, convolved, self.table(torch.tensor([0, 1, 1, 3]))), 1)

    def losses(self, separate: bool) -> list[Tensor]:
        """Return three losses, from one pass or from a pass each."""
        one = None if separate or any(self.skips) else self.features(0)
        outputs = [head(self.features(t) if one is None else one) for t, head in enumerate(self.heads)]
        return [
            (y.squeeze(1) * w).sum() + y.square().mean() for y, w in zip(outputs, _targets(outputs[0]), strict=True)
        ]


def _targets(like: Tensor) -> Tensor:
    """Return numbers that pull the trunk in different directions, (3, 4)."""
    return torch.tensor([[3.0, -2, 1, 0], [-3, 1, 2, -1], [1, 1, -4, 2]], dtype=like.dtype)


class Steps:
    """Steps of one model, each compared with the reference, and what is changed between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.reverse, self.separate, self.as_list = False, False, False
        self.groups: Any = "model"

    def changes(self) -> dict[str, Callable[[], object]]:
        """Return the changes by name."""
        model, weight = self.model, self.model.linear.weight
        return {
            "freeze": lambda: model.conv.bias.requires_grad_(not model.conv.bias.requires_grad),
            "transposed": lambda: setattr(weight, "data", weight.data.mT.contiguous().mT),
            "contiguous": lambda: setattr(weight, "data", weight.data.contiguous()),
            "channels last": lambda: model.conv.to(memory_format=torch.channels_last),
            "double": model.double,
            "float": model.float,
            "a new parameter": lambda: setattr(model, "linear", _renewed(model.linear)),
            "a sparse table": lambda: setattr(model.table, "sparse", not model.table.sparse),
            "task 0 skips": lambda: model.skips.__setitem__(0, not model.skips[0]),
            "two tasks skip": lambda: model.skips.__setitem__(slice(1, 3), [not model.skips[1]] * 2),
            "reverse": lambda: setattr(self, "reverse", not self.reverse),
            "separate": lambda: setattr(self, "separate", not self.separate),
            "a list": lambda: setattr(self, "as_list", not self.as_list),
            "by parameter": lambda: setattr(self, "groups", "parameter"),
            "one group": lambda: setattr(self, "groups", "model"),
        }

    def take(self) -> None:
        """Take a step, and compare every ``.grad`` with the reference."""
        names, params = zip(*self.model.named_parameters(), strict=True)
        trained = [(n, p) for n, p in zip(names, params, strict=True) if p.requires_grad]
        if self.reverse:
            trained.reverse()
        tensors = [p for _, p in trained]
        rows = task_gradients(self.model.losses(self.separate), tensors)
        rows = [[None if g is None else g.to_dense() for g in row] for row in rows]
        before = [None if p.grad is None else p.grad.to_dense().clone() for p in tensors]
        given: Any = tensors if self.as_list else trained
        info = gk.backward(
            self.model.losses(self.separate), given, aggregator=gk.PCGrad(order=ORDER), groups=self.groups
        )
        groups = [[k] for k in range(len(tensors))] if self.groups == "parameter" else [range(len(tensors))]
        assert info.weights.shape == ((3,) if self.groups == "model" else (len(tensors), 3))
        for members in groups:
            shared = [k for k in members if sum(row[k] is not None for row in rows) > 1]
            some = [tensors[k] for k in shared]
            flattened = [flat([row[k] for k in shared], some) for row in rows] if shared else []
            update = reference.pcgrad_update(flattened, ORDER) if shared else torch.zeros(0)
            scale = sum((row.norm() for row in flattened), torch.zeros((), dtype=torch.float64))
            for k, expected in zip(shared, update.split([p.numel() for p in some]), strict=True):
                self._compare(tensors[k], expected, before[k], float(scale))
            for k in set(members) - set(shared):
                own = next((row[k] for row in rows if row[k] is not None), None)
                if own is not None:
                    self._compare(tensors[k], own.flatten(), before[k], float(own.norm()))
                else:
                    assert (tensors[k].grad is None) == (before[k] is None)
        dense = [p.grad for p in tensors if p.grad is not None and not p.grad.is_sparse]
        storages = [g.untyped_storage().data_ptr() for g in dense]
        assert len(set(storages)) == len(storages)

    def _compare(self, p: Tensor, update: Tensor, before: Tensor | None, scale: float) -> None:
        total = update if before is None else update + before.double().flatten()
        near = TOLERANCES[p.dtype]
        bound = scale + (0.0 if before is None else float(before.double().norm()))
        assert p.grad.dtype == p.dtype
        if before is None and not p.grad.is_sparse:
            assert p.grad.stride() == p.stride()
        assert_near(p.grad.to_dense().flatten(), total, bound, near)


def _renewed(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(6, 8, dtype=linear.weight.dtype)


NAMES = list(Steps().changes())


@pytest.mark.parametrize("largest", [0, flat_rows.LARGEST], ids=["tensors", "matrix"])
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_nothing_remembered_is_out_of_date(largest: int, changes: list[tuple[str, bool]]) -> None:
    """Any changes in any order, with ``.grad`` cleared or kept before the next step."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flat_rows, "LARGEST", largest)
        steps = Steps()
        steps.take()
        for name, cleared in changes:
            steps.changes()[name]()
            if cleared or name in ("double", "float"):  # torch refuses to add numbers of two dtypes there too
                steps.model.zero_grad()
            steps.take()


def test_a_parameter_of_the_same_memory_and_another_shape() -> None:
    """Address and strides stay, and the number of elements in two of the changes; the shape alone changes."""
    p, q = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(3))
    memory = p.data
    for shape, strides in (((6, 6), (6, 1)), ((4, 6), (6, 1)), ((6, 4), (6, 1)), ((6, 4), (4, 1)), ((4, 6), (6, 1))):
        p.data = memory.as_strided(shape, strides)
        p.grad = q.grad = None
        factors = [torch.randn(shape) for _ in range(2)]
        gk.backward([(p * f).sum() + q.sum() for f in factors], [p, q], aggregator=gk.PCGrad(order=[0, 1]))
        rows = [torch.cat((f.flatten(), torch.ones(3))) for f in factors]
        expected = reference.pcgrad_update(rows, [[0, 1], [0, 1]])
        assert p.grad.shape == p.shape
        assert_near(torch.cat((p.grad.flatten(), q.grad)), expected, rows[0].norm() + rows[1].norm(), 3e-6)


class Watched(torch.autograd.Function):
    """Passes its input on, and counts how many of its results are still needed by a backward pass."""

    alive = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones(3))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].shape == (3,)
        return g


def test_graphs_that_met_in_earlier_steps_and_now_are_apart() -> None:
    """One forward pass for all tasks, then one for each: both are run backward, and each is freed."""
    w = nn.Parameter(torch.randn(3))
    x = torch.randn(2, 3)
    for separate in (False, False, True, True, False, True):
        h = Watched.apply(w * 2)
        one = [(Watched.apply(w * 2) if separate else h) for _ in range(2)]
        losses = [(one[t] * x[t]).sum() for t in range(2)]
        w.grad = None
        gk.backward(losses, [w], aggregator=gk.PCGrad(order=[0, 1]))
        expected = reference.pcgrad_update([2 * x[0], 2 * x[1]], [[0, 1], [0, 1]])
        assert_near(w.grad, expected, 2 * (x[0].norm() + x[1].norm()), 3e-6)
        for loss in losses:
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()


@pytest.mark.parametrize("as_callables", [False, True])
def test_reentrant_checkpointing_from_the_second_step_on_is_refused(as_callables: bool) -> None:
    """It hides the trunk of one task, which then looks like a head of the other."""
    trunk, heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    x = torch.randn(5, 4)

    def loss(t: int, hidden: bool) -> Tensor:
        if not hidden:
            return heads[t](trunk(x)).square().mean()
        given = x.clone().requires_grad_()  # else the trunk's output would not require grad
        return heads[t](checkpoint(trunk, given, use_reentrant=True)).square().mean()

    def losses(hidden: bool) -> list[Any]:
        tasks = [(0, hidden), (1, False)]
        return [lambda task=task: loss(*task) for task in tasks] if as_callables else [loss(*task) for task in tasks]

    params = [*trunk.parameters(), *heads.parameters()]
    for _ in range(2):
        gk.backward(losses(False), params, aggregator=gk.PCGrad())
    for p in params:
        p.grad = None
    with pytest.raises(ValueError, match="reentrant activation checkpointing"):
        gk.backward(losses(True), params, aggregator=gk.PCGrad())
    assert all(p.grad is None for p in params)


def test_a_checkpoint_whose_parameters_have_another_way_to_the_loss_is_refused() -> None:
    """Nothing is without a gradient then, but what goes through the checkpoint would be missing."""
    table, bias, scale = nn.Embedding(7, 4), nn.Parameter(torch.zeros(7)), torch.ones(1, requires_grad=True)

    def hidden(s: Tensor) -> Tensor:
        return torch.tanh(table(torch.tensor([1, 2, 3])) * s)

    for n in range(4):
        h = checkpoint(hidden, scale, use_reentrant=True) if n == 3 else hidden(scale)
        out = h @ table.weight.t() + bias
        losses = [out.logsumexp(-1).sum(), out[:, 2].sum()]
        if n < 3:
            gk.backward(losses, [table.weight, bias], aggregator=gk.PCGrad())
        else:
            with pytest.raises(ValueError, match=r"losses\[0\] runs through reentrant"):
                gk.backward(losses, [table.weight, bias], aggregator=gk.PCGrad())


def test_a_second_callable_with_a_checkpoint_is_refused_in_the_first_step() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(5, 4, requires_grad=True)

    def decay() -> Tensor:
        return sum((p.square().sum() for p in layer.parameters()), torch.zeros(()))

    losses = [
        lambda: layer(x).sum() + decay(),
        lambda: checkpoint(layer, x, use_reentrant=True).square().sum() + decay(),
    ]
    with pytest.raises(ValueError, match=r"losses\[1\] runs through reentrant"):
        gk.backward(losses, layer, aggregator=gk.PCGrad())


@pytest.mark.parametrize("size", [(7, 5), (700, 500)])
def test_a_callable_that_lays_a_parameter_out_anew(size: tuple[int, int]) -> None:
    """The step goes by the layout that the parameter has when all callables have run."""
    p = nn.Parameter(torch.randn(size))
    before = p.detach().clone()
    factors = torch.randn(2, *size)
    opt = gk.SurgeryOptimizer(gk.optim.AdamW([p], lr=0.1, weight_decay=0.0), gk.PCGrad(order=[0, 1]))

    def first() -> Tensor:
        p.data = p.data.mT.contiguous().mT
        return (p * factors[0]).sum()

    w = opt.update([first, lambda: (p * factors[1]).sum()]).weights
    g = w[0] * factors[0] + w[1] * factors[1]
    assert torch.equal((p.detach() - before).sign(), -g.sign())  # AdamW's first step is lr long, against the gradient


def test_a_module_that_takes_its_shape_in_the_first_step() -> None:
    model, x = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(4, 5)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), 0.1), gk.PCGrad(order=[0, 1]))
    for _ in range(2):
        opt.zero_grad()
        opt.backward([lambda: model(x)[:, 0].sum(), lambda: model(x)[:, 1].square().sum()])
        params = list(model.parameters())
        losses = [model(x)[:, 0].sum(), model(x)[:, 1].square().sum()]
        rows = [flat(row, params) for row in task_gradients(losses, params)]
        expected = reference.pcgrad_update(rows, [[0, 1], [0, 1]])
        assert_near(flat([p.grad for p in params], params), expected, sum(row.norm() for row in rows), 3e-6)
