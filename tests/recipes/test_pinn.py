"""Tests of the recipe for physics-informed networks: its equation, both of its steps, and what it has learned."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.models import flat, task_gradients
from tests.recipes.test_recipes import ORDER, grads, recipe
from tests.tolerances import TOLERANCES, assert_near

pytestmark = pytest.mark.filterwarnings("error:the losses reach")  # points that require grad are no parameters
pinn = recipe("pinn")
FLOAT64 = TOLERANCES[torch.float64]


def heat(t: Tensor, x: Tensor) -> Tensor:
    """Return the solution of the equation without its term u u_x, from the same initial condition.

    The condition's sine series is sin θ / (A + cos θ) = 2 Σ_n (-1)^(n+1) r^n sin nθ with r = A - √(A² - 1).
    """
    r = pinn.A - math.sqrt(pinn.A**2 - 1)
    terms = (
        (-1) ** (n + 1) * r**n * torch.exp(-((n * math.pi) ** 2) * pinn.NU * t) * torch.sin(n * math.pi * x)
        for n in range(1, 60)
    )
    return 4 * math.pi * pinn.NU * sum(terms)


def trained_by_adam(steps: int) -> tuple[pinn.Net, gk.SurgeryOptimizer, pinn.Points]:
    model, opt, points = pinn.build()
    for _ in range(steps):
        pinn.adam_step(model, opt, points)
    return model, opt, points


def test_the_exact_solution_alone_has_losses_of_zero() -> None:
    _, _, points = pinn.build()
    # Up to the roundings of numbers around 10, the size of u_xx, which are squared here.
    assert all(loss() < 1e-26 for loss in pinn.losses(pinn.exact, points))
    equation, boundary, initial = pinn.losses(heat, points)
    assert boundary() < 1e-26
    assert initial() < 1e-26
    assert equation() > 1e-2
    equation, boundary, initial = pinn.losses(lambda t, x: 0 * t + 1 + 0 * x.square(), points)
    assert equation() == 0
    assert boundary() == 1
    assert initial() > 0.1


def test_its_points_are_where_they_belong() -> None:
    _, _, points = pinn.build()
    (t, x), (_, end), (start, place) = points
    for v in (t, x, points.boundary[0], place):
        assert v.min() < 0.1 < 0.9 < v.max()
    assert end.unique().tolist() == [0, 1]
    assert not start.any()


def test_a_step_of_adam_follows_the_reference() -> None:
    model, opt, points = pinn.build()
    opt.aggregator = gk.PCGrad(order=ORDER)
    params = list(model.parameters())
    for _ in range(3):
        rows = [flat(row, params) for row in task_gradients([f() for f in pinn.losses(model, points)], params)]
        info = pinn.adam_step(model, opt, points)
        assert info.conflicts.any()
        assert_near(grads(model), reference.pcgrad_update(rows, ORDER), info.norms.sum(), FLOAT64)
        cosines = [[reference.cosine(a, b) for b in rows] for a in rows]
        assert_near(info.cosines, torch.tensor(cosines, dtype=torch.float64), 1.0, FLOAT64)


class Captured:
    """An optimizer that keeps the closure and takes no step."""

    def __init__(self, model: pinn.Net) -> None:
        self.zero_grad = model.zero_grad

    def step(self, closure: Callable[[], Tensor]) -> None:
        self.closure = closure


def test_the_closure_of_lbfgs_starts_with_the_references_update_and_is_a_function_with_its_gradient() -> None:
    model, _, points = trained_by_adam(20)
    params = list(model.parameters())
    values = [f() for f in pinn.losses(model, points)]
    rows = [flat(row, params) for row in task_gradients(values, params)]
    opt = Captured(model)
    info = pinn.lbfgs_step(model, opt, points)
    assert info.conflicts.any()
    assert info.weights.min() >= 1
    value = opt.closure()
    assert_near(value, torch.stack(values).detach() @ info.weights, value, FLOAT64)
    assert_near(grads(model), reference.pcgrad_update(rows, [range(3)] * 3), info.norms.sum(), FLOAT64)
    # Elsewhere too its gradient is that of its value, by central differences. With h = 1e-5 these are off by h² times a
    # third derivative, and by float64's roundings divided by h, about 1e-10 each; tanh's derivatives may be larger.
    h, direction = 1e-5, [torch.randn_like(p) for p in params]

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=by)
        return opt.closure().detach()

    moved(0.01)
    slope = grads(model) @ flat(direction, params)
    difference = (moved(h) - moved(-2 * h)) / (2 * h)
    assert_near(difference, slope, slope.abs(), 1e-6)


def total(model: pinn.Net, points: pinn.Points) -> float:
    return sum(f().item() for f in pinn.losses(model, points))


def test_surgery_in_every_call_of_the_closure_ends_the_search_early() -> None:
    """The reason for the recipe's way, with the same method, the same start and as many iterations allowed."""

    def after(step: Callable[[pinn.Net, torch.optim.LBFGS, pinn.Points], object]) -> float:
        model, _, points = trained_by_adam(100)
        opt = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
        for _ in range(5):
            step(model, opt, points)
        return total(model, points)

    def every_call(model: pinn.Net, opt: torch.optim.LBFGS, points: pinn.Points) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            return gk.backward(pinn.losses(model, points), model, aggregator=gk.PCGrad(order=range(3))).losses.sum()

        opt.step(closure)

    assert after(pinn.lbfgs_step) < 0.2 * after(every_call)


def test_it_learns_the_exact_solution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes closer to the solution, by far, than a network that learned the equation without the term u u_x."""
    pytest.importorskip("matplotlib", reason="draws the figure")
    monkeypatch.setattr(pinn, "ADAM_STEPS", 200)
    monkeypatch.setattr(pinn, "LBFGS_STEPS", 6)
    kept = []
    train = pinn.train
    monkeypatch.setattr(pinn, "train", lambda: kept.extend(train()) or kept)
    pinn.main(str(tmp_path / "out"))
    model, run, after_adam = kept
    t, x = pinn.grid()
    exact = pinn.exact(t, x)
    without_the_term = ((heat(t, x) - exact).norm() / exact.norm()).item()
    assert pinn.relative_error(model) < without_the_term / 2
    assert pinn.relative_error(model) < after_adam / 2 < 0.5 / 2  # a network that is zero has an error of 1

    assert len(run) == 206
    cosines = torch.tensor([[row[f"cosine/{pair}"] for row in run] for pair in PAIRS])
    assert (cosines.abs() <= 1 + 1e-12).all()
    assert (cosines.min(1).values < 0).all()  # every two tasks conflict at some time
    at_lbfgs = [sum(row[f"loss/{task}"] for task in pinn.TASKS) for row in run[-6:]]
    assert at_lbfgs[-1] < at_lbfgs[0] / 10

    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{pinn.relative_error(model):.1%} after L-BFGS" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pinn.png"]
    drawn = pinn.draw(model, run)
    assert [line.get_label() for line in drawn.axes[1].get_lines() if line.get_label() in PAIRS] == PAIRS
    dashed = [line for line in drawn.axes[0].get_lines() if line.get_linestyle() == "--"]
    shown = torch.tensor(dashed[2].get_ydata())
    assert_near(
        shown, model(torch.full((51, 1), 0.48).double(), x[:51]).detach().squeeze(), 1.0, 1e-7
    )  # float32's 0.48


PAIRS = ["equation-boundary", "equation-initial", "boundary-initial"]


def test_it_runs_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pinn")
    bare = recipe("pinn")
    monkeypatch.setattr(bare, "ADAM_STEPS", 2)
    monkeypatch.setattr(bare, "LBFGS_STEPS", 1)
    bare.main(str(tmp_path / "out"))
    assert capsys.readouterr().out.endswith("; no figure without matplotlib\n")
    assert not list(tmp_path.iterdir())
