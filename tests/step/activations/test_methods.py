"""Every method that a Gramian or losses suffice for, through activations, compared with its twin on whole rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from gradkern.aggregators import Entrywise, GradAttention, Scalarization
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from tests.models import MultiHead, flat, problem, task_gradients
from tests.step.activations.truth import FINISHES
from tests.tolerances import assert_near

NEAR = 1e-9
"""Of float64, where class and twin solve the same small problem in other ways."""
ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
STEPS = 4


def suffices(method: Method) -> bool:
    """Return whether a method needs neither entries of the gradients, nor their means, nor a second batch."""
    kind = method.aggregator
    return not (issubclass(kind, Entrywise | GradAttention) or kind.averages_rows or kind.needs_second)


SUFFICE = {name: method for name, method in METHODS.items() if suffices(method)}

pytestmark = [
    pytest.mark.usefixtures("float64_by_default"),
    pytest.mark.filterwarnings("ignore:nothing trains the parameters"),  # as is right here
]
each_method = pytest.mark.parametrize("method", SUFFICE.values(), ids=list(SUFFICE))
each_finish = pytest.mark.parametrize("finish", FINISHES)


def batches() -> tuple[MultiHead, list[tuple[Tensor, Tensor]]]:
    """Return a model, and a batch with targets for each step."""
    model, x, y = problem()
    return model, [(x.roll(k, 1), y * (1 - 0.3 * k) + k) for k in range(STEPS)]


def rows_of(model: MultiHead, x: Tensor, y: Tensor) -> list[Tensor]:
    trunk = list(model.trunk.parameters())
    return [flat(row, trunk) for row in task_gradients(model.losses(x, y), trunk)]


def grad_of(params: list[Tensor]) -> Tensor:
    return flat([p.grad for p in params], params)


@each_finish
@each_method
def test_its_steps_are_those_of_its_twin(method: Method, finish: str) -> None:
    model, steps = batches()
    trunk = list(model.trunk.parameters())
    rows = [rows_of(model, *step) for step in steps]
    losses = [[loss.item() for loss in model.losses(*step)] for step in steps]
    made = method.make(ORDER)
    given: dict[str, Any] = {"losses": losses} if method.losses or made.needs_losses else {}
    expected = method.expected(rows, ORDER, **given)
    assert expected
    for step, J, update, own in zip(steps, rows, expected, losses, strict=False):
        model.zero_grad()
        info = gk.backward(model.losses(*step), model, aggregator=made, through="activations", finish=finish)
        assert_near(grad_of(trunk), update, sum(row.norm() for row in J), NEAR)
        torch.testing.assert_close(info.losses, torch.tensor(own), rtol=NEAR, atol=0)
        if made.needs_gramian:
            assert_near(info.gramian, reference.gramian(J), max(row.norm() for row in J) ** 2, NEAR)
        weights = info.weights if isinstance(made, Scalarization) else torch.ones(3)
        for t, (head, loss) in enumerate(zip(model.heads, model.losses(*step), strict=True)):
            expected_head = weights[t] * flat(
                torch.autograd.grad(loss, list(head.parameters())), list(head.parameters())
            )
            assert_near(grad_of(list(head.parameters())), expected_head, expected_head.abs().max(), NEAR)


@each_finish
@each_method
def test_a_task_that_is_absent(method: Method, finish: str) -> None:
    """The update is a combination of the present rows, by the weights in ``info``, and those are the weights of M."""
    model, steps = batches()
    made, twin = method.make(ORDER), method.make(ORDER)
    if 1 in made.required:
        pytest.skip("this task is needed in each step")
    step = steps[0]
    rows = rows_of(model, *step)
    rows[1] = torch.zeros_like(rows[1])
    losses: list[Any] = model.losses(*step)
    losses[1] = None
    info = gk.backward(losses, model, aggregator=made, through="activations", finish=finish)
    J = torch.stack(rows)
    if not isinstance(made, Scalarization):
        present = torch.tensor([True, False, True]) if made.needs_present else None
        given = {"losses": info.losses} if made.needs_losses else {}
        solution = twin.solution((J @ J.T).unsqueeze(0), present, **given)
        scale = solution.weights.abs().max()
        assert_near(info.weights[::2], solution.weights[0, ::2], scale, NEAR)
    assert_near(grad_of(list(model.trunk.parameters())), info.weights @ J, sum(row.norm() for row in rows), NEAR)
    assert all(p.grad is None for p in model.heads[1].parameters())


@each_finish
@pytest.mark.parametrize("reduce", ["mean", "min"])
@pytest.mark.parametrize("mode", ["attenuate", "amplify"])
def test_the_learning_rate_by_conflict(mode: str, reduce: str, finish: str) -> None:
    model, steps = batches()
    opt = gk.SurgeryOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        gk.PCGrad(order=ORDER),
        conflict_lr=gk.ConflictLR(mode, reduce),
        through="activations",
        finish=finish,
    )
    for step in steps:
        rows = rows_of(model, *step)
        kappa = reference.step_scale(rows, mode, reduce)
        trunk = list(model.trunk.parameters())
        before = flat([p.detach().clone() for p in trunk], trunk)
        opt.zero_grad()
        info = opt.backward(model.losses(*step))
        opt.step()
        assert float(info.step_scale) == pytest.approx(kappa, rel=NEAR)
        moved = before - flat([p.detach() for p in trunk], trunk)
        assert_near(moved, 0.1 * kappa * reference.pcgrad_update(rows, ORDER), sum(row.norm() for row in rows), NEAR)


OBJECTIVES: dict[str, Any] = {
    "uncertainty": (gk.Uncertainty, lambda L, s: (L * torch.exp(-s) / 2 + s / 2).sum()),
    "imtl-l": (gk.IMTLL, lambda L, s: (s.exp() * L - s).sum()),
}


@each_finish
@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_trained_weighting_minimises_its_objective(name: str, report: bool, finish: str) -> None:
    model, steps = batches()
    kind, objective = OBJECTIVES[name]
    method = kind(3, report=report)
    (s,) = method.parameters()
    with torch.no_grad():
        s.copy_(torch.tensor([0.3, -0.7, 1.1]))
    params = [*model.parameters(), s]
    expected = torch.autograd.grad(objective(torch.stack(model.losses(*steps[0])), s), params)
    rows = rows_of(model, *steps[0])
    info = gk.backward(model.losses(*steps[0]), params, aggregator=method, through="activations", finish=finish)
    for p, g in zip(params, expected, strict=True):
        assert_near(p.grad, g, g.abs().max(), 1e-6)  # the parameter and its gradient are float32
    if report:
        assert_near(info.gramian, reference.gramian(rows), max(row.norm() for row in rows) ** 2, NEAR)


@each_finish
def test_a_report_does_not_change_the_update(finish: str) -> None:
    model, steps = batches()
    rows = rows_of(model, *steps[0])
    method = gk.Constant([1.0, 2.0, 0.5], report=True)
    info = gk.backward(model.losses(*steps[0]), model, aggregator=method, through="activations", finish=finish)
    expected = rows[0] + 2 * rows[1] + 0.5 * rows[2]
    assert_near(grad_of(list(model.trunk.parameters())), expected, sum(row.norm() for row in rows), NEAR)
    assert_near(info.gramian, reference.gramian(rows), max(row.norm() for row in rows) ** 2, NEAR)
