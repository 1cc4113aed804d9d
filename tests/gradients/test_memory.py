"""Steps that bring some tasks only: with ``memory=True`` the absent ones take part with their last gradients."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.models import MultiHead, flat, problem, task_gradients
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
# Which tasks are present, step by step: one alone, others alone, two, all, none of one for long.
PRESENT = [[0], [1], [2], [0], [1, 2], [0, 1, 2], [1], [1], [0]]


class Vaccine:
    """GradVac's twin over steps: only the present tasks' targets move."""

    def __init__(self) -> None:
        self.targets = torch.zeros(3, 3, dtype=torch.float64)
        self.present: Sequence[int] = ()

    def __call__(self, rows: Sequence[Tensor]) -> list[Tensor]:
        eps = torch.finfo(torch.float32).eps
        modified, moved = reference.gradvac(rows, ORDER, self.targets, 0.3, eps)
        for i in self.present:
            self.targets[i] = moved[i]
        return modified


Twin = Callable[[Sequence[Tensor]], list[Tensor]]
METHODS: dict[str, tuple[Callable[[], gk.Aggregator], Callable[[], Twin]]] = {
    "pcgrad": (lambda: gk.PCGrad(order=ORDER), lambda: lambda rows: reference.pcgrad(rows, ORDER)),
    "average": (lambda: gk.PCGrad("average"), lambda: reference.pcgrad_average),
    "gradvac": (lambda: gk.GradVac(0.3, order=ORDER), Vaccine),
}


def losses_of(model: MultiHead, x: Tensor, y: Tensor, present: Sequence[int], step: int) -> list[Tensor | None]:
    shifted = x + 0.3 * step  # every step has data of its own
    return [model.loss(t, shifted, y) if t in present else None for t in range(3)]


def optimizer(model: MultiHead, method: gk.Aggregator, **options: object) -> gk.SurgeryOptimizer:
    inner = torch.optim.SGD(model.named_parameters(), lr=0.05)
    return gk.SurgeryOptimizer(inner, method, shared=model.trunk, memory=True, **options)


@pytest.mark.parametrize("name", METHODS)
def test_as_the_twin_that_keeps_the_vectors(name: str, back_end: str) -> None:
    make, make_twin = METHODS[name]
    model, x, y = problem()
    trunk = list(model.trunk.parameters())
    opt, twin = optimizer(model, make()), make_twin()
    memory = reference.Memory(3, sum(p.numel() for p in trunk))
    for step, present in enumerate(PRESENT):
        opt.zero_grad()
        losses = losses_of(model, x, y, present, step)
        there = [loss for loss in losses if loss is not None]
        rows = {t: flat(g, trunk) for t, g in zip(present, task_gradients(there, trunk), strict=True)}
        if isinstance(twin, Vaccine):
            twin.present = present
        expected = memory.step(rows, twin)
        heads = {t: task_gradients([losses[t]], list(model.heads[t].parameters()))[0] for t in present}
        info = opt.backward(losses)
        size = torch.stack(memory.rows).norm(dim=1).max()
        # 1e-4: a float32 Gramian, whose roundings nearly parallel rows magnify, and GradVac's targets carry on.
        assert_near(flat([p.grad for p in trunk], trunk), expected, size, 1e-4)
        assert_near(info.gramian, reference.gramian(memory.rows), size**2, 1e-5)  # float32, some hundred terms
        for t, head in enumerate(model.heads):
            for k, p in enumerate(head.parameters()):
                assert (p.grad is None) if t not in present else torch.equal(p.grad, heads[t][k])
        opt.step()


def test_shared_is_what_two_losses_have_reached_so_far() -> None:
    """Without ``shared=``: the first step's only task trains alone, from the second on the trunk is shared."""
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.05)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), memory=True)
    trunk = list(model.trunk.parameters())
    seen = reference.Memory(3, sum(p.numel() for p in trunk))
    for step, present in enumerate(PRESENT):
        opt.zero_grad()
        losses = losses_of(model, x, y, present, step)
        there = [loss for loss in losses if loss is not None]
        rows = {t: flat(g, trunk) for t, g in zip(present, task_gradients(there, trunk), strict=True)}
        expected = seen.step(rows, lambda rows: reference.pcgrad(rows, ORDER))
        opt.backward(losses)
        assert_near(flat([p.grad for p in trunk], trunk), expected, torch.stack(seen.rows).norm(dim=1).max(), 1e-4)
        opt.step()


def test_without_memory_an_absent_row_is_zero() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.05)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), shared=model.trunk)
    opt.backward(model.losses(x, y))
    info = opt.backward([model.loss(0, x, y), None, None])
    assert torch.equal(info.gramian != 0, torch.tensor([[True, False, False], [False] * 3, [False] * 3]))


def test_attention_and_a_method_of_ones_own_weigh_the_present_tasks_alone() -> None:
    class Strongest(gk.Aggregator):
        def weights(self, M: Tensor) -> Tensor:
            return M.diagonal(dim1=-2, dim2=-1).clone()

    for method in (Strongest(), gk.GradAttention(subset=8), gk.GradAttention(subset=8, update="subset")):
        model, x, y = problem()
        opt = optimizer(model, method)
        opt.backward(model.losses(x, y))
        info = opt.backward([None, model.loss(1, x, y), None])
        assert torch.equal(info.weights != 0, torch.tensor([False, True, False]))
        assert (info.gramian.diagonal() > 0).all()


def test_no_gradient_is_copied() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad())
    seen: list[int] = []
    model.trunk[0].weight.register_hook(lambda g: seen.append(g.data_ptr()))
    opt.backward(model.losses(x, y))
    assert opt._memory is not None
    kept = [row[0].data_ptr() for row in opt._memory.state_dict([model.trunk[0].weight])]
    assert kept == seen


def test_a_parameter_frozen_for_a_while() -> None:
    """Task 0's step with the parameter frozen brought no gradient for it; task 2's is older and still there."""
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad(order=ORDER))
    trunk = list(model.trunk.parameters())
    rows = [flat(g, trunk) for g in task_gradients(model.losses(x, y), trunk)]
    opt.backward(model.losses(x, y))
    trunk[0].requires_grad_(False)
    opt.backward([model.loss(0, x, y), None, None])
    trunk[0].requires_grad_(True)
    opt.zero_grad()
    opt.backward([None, model.loss(1, x, y), None])
    rows[0][: trunk[0].numel()] = 0
    expected = reference.pcgrad(rows, ORDER)[1]
    assert_near(flat([p.grad for p in trunk], trunk), expected, expected.abs().max(), 1e-4)  # as above


def convolution(memory_format: torch.memory_format) -> tuple[nn.Conv2d, gk.SurgeryOptimizer]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=memory_format)
    return conv, gk.SurgeryOptimizer(torch.optim.SGD(conv.parameters(), lr=0.1), gk.PCGrad(order=[0, 1]), memory=True)


def convolution_losses(conv: nn.Conv2d) -> list[Tensor]:
    torch.manual_seed(1)
    out = conv(torch.randn(2, 3, 6, 6).to(conv.weight.dtype)).float()
    return [(out * torch.randn(2, 4, 4, 4)).sum() for _ in range(2)]


@pytest.mark.parametrize("change", ["checkpoint", "layout", "dtype"])
def test_a_parameter_that_has_changed_since(change: str, back_end: str) -> None:
    """Rows that lie as the parameter once did, or are of another dtype, are read for what they mean."""
    expected_conv, expected_opt = convolution(torch.contiguous_format)
    expected_opt.backward(convolution_losses(expected_conv))
    conv, opt = convolution(torch.channels_last if change == "checkpoint" else torch.contiguous_format)
    if change == "checkpoint":
        opt.load_state_dict(expected_opt.state_dict())
    else:
        opt.backward(convolution_losses(conv))
        conv.to(memory_format=torch.channels_last) if change == "layout" else conv.bfloat16()
    expected = expected_opt.backward([convolution_losses(expected_conv)[0], None]).gramian
    found = opt.backward([convolution_losses(conv)[0], None]).gramian
    # float32 sums in another order; bfloat16 rows and activations round to 8 bits.
    assert_near(found, expected, expected.diagonal().max(), 0.05 if change == "dtype" else 1e-5)


@pytest.mark.parametrize(
    "method",
    [gk.PCGrad(order=ORDER), gk.GradVac(0.3, order=ORDER), gk.GradAttention(8), gk.GradAttention(8, update="subset")],
    ids=repr,
)
def test_one_overflowed_step_spoils_no_other(method: gk.Aggregator) -> None:
    """The scaler skips that one alone; until its next step the task takes no part."""
    model, x, y = problem()
    opt = optimizer(model, copy.deepcopy(method))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    finite = []
    for step in range(7):
        opt.zero_grad()
        losses: list[Tensor | None] = [None, None, None]
        losses[step % 3] = scaler.scale(model.loss(step % 3, x, y) * (torch.inf if step == 4 else 1.0))
        opt.backward(losses)
        finite.append(all(p.grad.isfinite().all() for p in model.trunk.parameters()))
        scaler.step(opt)
        scaler.update()
    assert finite == [True] * 4 + [False] + [True] * 2
    assert scaler.get_scale() == 2.0**9


def test_a_view_keeps_no_larger_tensor_alive() -> None:
    class Slices(torch.autograd.Function):
        """The gradient of 4 numbers is a view of a million."""

        @staticmethod
        def forward(ctx: Any, p: Tensor) -> Tensor:
            return p.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.ones(10**6)[:4]

    p = nn.Parameter(torch.ones(4))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.1), gk.PCGrad(), memory=True)
    opt.backward([Slices.apply(p).sum(), (2 * p).sum()])
    assert opt._memory is not None
    kept = [g for row in opt._memory.state_dict([p]) for g in row]
    assert [None if g is None else g.untyped_storage().nbytes() for g in kept] == [16, 16]


@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_resumed_it_goes_on_exactly(how: str) -> None:
    def train(model: MultiHead, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.backward(losses_of(model, x, y, PRESENT[step], step))
            opt.step()

    def start() -> tuple[MultiHead, gk.SurgeryOptimizer, Tensor, Tensor]:
        model, x, y = problem()
        inner = torch.optim.Adam(model.named_parameters(), lr=0.05)
        return model, gk.SurgeryOptimizer(inner, gk.GradVac(0.3, order=ORDER), memory=True), x, y

    model, opt, x, y = start()
    train(model, opt, x, y, range(5))
    if how == "checkpoint":
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, resumed, *_ = start()
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((model, opt))
    else:
        other, resumed = pickle.loads(pickle.dumps((model, opt)))
    train(model, opt, x, y, range(5, 9))
    train(other, resumed, x, y, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_another_number_of_tasks_is_refused() -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.PCGrad())
    opt.backward(model.losses(x, y))
    with pytest.raises(ValueError, match="losses has 2 entries; the steps remembered had 3"):
        opt.backward(model.losses(x, y)[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda memory: 3, "memory to load must be lists of gradients.*got 3"),
        (lambda memory: [row[:-1] for row in memory], r"memory of task 0 is of 9 parameters, not of 10"),
        (
            lambda memory: [[torch.ones(2), *row[1:]] for row in memory],
            r"memory of task 0 for parameter 0 must be .*\(2,\)",
        ),
    ],
)
def test_a_memory_that_does_not_fit_loads_nothing(change: Callable[[object], object], message: str) -> None:
    model, x, y = problem()
    opt = optimizer(model, gk.GradVac(order=ORDER))
    opt.backward(model.losses(x, y))
    state = copy.deepcopy(opt.state_dict())
    targets = opt.aggregator.targets.clone()
    state["surgery"]["memory"] = change(state["surgery"]["memory"])
    state["surgery"]["state"]["targets"] += 0.1
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert torch.equal(opt.aggregator.targets, targets)


def test_a_step_that_cannot_write_grad_leaves_memory_and_masks_as_they_were() -> None:
    layer = torch.nn.Linear(3, 2)
    suppression = gk.Suppression(0.5, seed=1)
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(layer.parameters(), 0.1), gk.PCGrad(order=[0, 1]), memory=True, suppression=suppression
    )
    with torch.inference_mode():
        layer.bias.grad = torch.zeros(2)
    out = layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"\.grad of params\[1\] in params cannot be added to .* inference mode"):
        opt.backward([out[:, 0].sum(), -out.sum()])
    surgery = opt.state_dict()["surgery"]
    assert surgery["memory"] == []
    assert surgery["suppression"]["step"] == 0
