"""A physics-informed network: surgery between the losses of the equation, the boundary and the initial condition.

The equation is Burgers', u_t + u u_x = ν u_xx for t and x from 0 to 1, with u = 0 at both ends. It is not linear, and
for the initial condition here a short formula gives its exact solution, so the network's error is known.

Adam trains first, as it trains any model. L-BFGS is next, and needs more care: its line search compares values and
gradients of one function, and no function has the results of surgery as its gradients. Surgery in every call of the
closure therefore ends the search early. So one surgery at the start of a step gives the weights, and they stay for all
iterations of the step. The closure returns the weighted sum of the losses, and its backward pass writes the gradient.

Run ``python recipes/pinn.py``, or with ``--cost`` for the time of a step of Adam. The recipe does not show that surgery
helps: compare it with ``gk.Sum()`` on your own equation.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cost import Backward, measure, report
from torch import Tensor, nn

import gradkern as gk

try:
    from matplotlib.figure import Figure

    from gradkern.plots import COLORS, count_along, legend_beside
except ImportError:  # pip install "gradkern[demo]"; without it there is no figure
    Figure = None

TASKS = ("equation", "boundary", "initial")
ADAM_STEPS, LBFGS_STEPS = 500, 10
NU, A = 0.1, 1.5  # viscosity; A > 1, and the closer to 1 the steeper the solution


def exact(t: Tensor, x: Tensor) -> Tensor:
    """Return the solution at times t and places x (Wood 2006, "An exact solution for Burger's equation").

    It is u = -2ν φ_x / φ (Cole 1951) of φ = A + exp(-π²νt) cos(πx), which solves the heat equation φ_t = ν φ_xx.
    """
    decay = torch.exp(-(math.pi**2) * NU * t)
    return 2 * math.pi * NU * decay * torch.sin(math.pi * x) / (A + decay * torch.cos(math.pi * x))


class Net(nn.Module):
    """The network u(t, x). All its parameters are shared by the three losses."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()]
        self.layers = nn.Sequential(*hidden, nn.Linear(20, 1))
        self.double()  # L-BFGS works with differences of gradients, which near the minimum are float32's roundings

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return u, (n, 1), from t and x, (n, 1)."""
        return self.layers(torch.cat([t, x], 1))


class Points(NamedTuple):
    """The points of each loss: t and x, (n, 1) float64. They are the same in all steps, as L-BFGS needs them."""

    equation: tuple[Tensor, Tensor]
    boundary: tuple[Tensor, Tensor]
    initial: tuple[Tensor, Tensor]


def random_points() -> Points:
    """Return 400 points inside, 50 on the boundary and 50 at t = 0."""
    inside, boundary, initial = (torch.rand(2, n, 1, dtype=torch.float64) for n in (400, 50, 50))
    return Points(
        (inside[0].requires_grad_(), inside[1].requires_grad_()),
        (boundary[0], boundary[1].round()),
        (torch.zeros_like(initial[0]), initial[1]),
    )


def losses(model: Net, points: Points) -> list[Callable[[], Tensor]]:
    """Return the three losses as callables: each has points of its own, so nothing is shared but the parameters."""

    def equation() -> Tensor:
        t, x = points.equation
        u = model(t, x)
        u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return (u_t + u * u_x - NU * u_xx).square().mean()

    def boundary() -> Tensor:
        return model(*points.boundary).square().mean()

    def initial() -> Tensor:
        return (model(*points.initial) - exact(*points.initial)).square().mean()

    return [equation, boundary, initial]


def build() -> tuple[Net, gk.SurgeryOptimizer, Points]:
    """Return the network, its optimizer for the first phase, and the points."""
    torch.manual_seed(0)
    model = Net()
    opt = gk.SurgeryOptimizer(torch.optim.Adam(model.named_parameters(), lr=5e-3), gk.PCGrad())
    return model, opt, random_points()


def adam_step(
    model: Net, opt: gk.SurgeryOptimizer, points: Points, backward: Backward = gk.SurgeryOptimizer.backward
) -> gk.SurgeryInfo | None:
    """Take a step of Adam; return what ``backward``, which fills ``.grad``, returns."""
    opt.zero_grad()
    info = backward(opt, losses(model, points))
    opt.step()
    return info


def lbfgs_step(model: Net, opt: torch.optim.LBFGS, points: Points) -> gk.SurgeryInfo:
    """Take a step of L-BFGS, which is many iterations; return the surgery at its start.

    PCGrad's weights are at least 1, so no loss drops out of the weighted sum. Their order is fixed because L-BFGS keeps
    its estimate of the curvature from step to step. A random order would change the weighted sum in each step, even if
    the gradients did not change.
    """
    opt.zero_grad()
    info = gk.backward(losses(model, points), model, aggregator=gk.PCGrad(order=range(len(TASKS))))
    held = gk.Constant(info.weights)

    def closure() -> Tensor:
        opt.zero_grad()
        return gk.backward(losses(model, points), model, aggregator=held).losses @ info.weights

    opt.step(closure)
    return info


def grid() -> tuple[Tensor, Tensor]:
    """Return t and x of a grid of 51 x 51 points, (2601, 1) each; t varies slowest."""
    ticks = torch.linspace(0, 1, 51, dtype=torch.float64)
    return ticks.repeat_interleave(51).unsqueeze(1), ticks.repeat(51).unsqueeze(1)


def relative_error(model: Net) -> float:
    """Return the length of the error on the grid, divided by the length of the exact solution."""
    with torch.no_grad():
        return ((model(*grid()) - exact(*grid())).norm() / exact(*grid()).norm()).item()


def train() -> tuple[Net, list[dict[str, float]], float]:
    """Train by Adam and then by L-BFGS; return the network, the numbers of each step, and the error after Adam."""
    model, opt, points = build()
    run = [adam_step(model, opt, points).scalars(TASKS) for _ in range(ADAM_STEPS)]
    after_adam = relative_error(model)
    lbfgs = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    run += [lbfgs_step(model, lbfgs, points).scalars(TASKS) for _ in range(LBFGS_STEPS)]
    return model, run, after_adam


def draw(model: Net, run: list[dict[str, float]]) -> "Figure":
    """Draw the solution beside the exact one at five times, and the cosines of the task gradients over the steps."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    solution, cosines = figure.subplots(1, 2)
    t, x = (v.view(51, 51) for v in grid())
    with torch.no_grad():
        u = model(*grid()).view(51, 51)
    for color, k in zip(COLORS, range(0, 51, 12), strict=False):
        solution.plot(x[k], exact(t, x)[k], color=color, alpha=0.4, linewidth=4, label=f"exact, t = {t[k, 0]:.2f}")
        solution.plot(x[k], u[k], "--", color=color)
    solution.set_xlabel("x")
    solution.set_title(f"u of the network (dashed), relative error {relative_error(model):.1%}", fontsize="medium")
    legend_beside(solution)
    window = max(1, len(run) // 20)
    tags = [tag for tag in run[0] if tag.startswith("cosine/")]
    for color, tag in zip(COLORS, tags, strict=False):
        values = torch.tensor([row[tag] for row in run])
        cosines.plot(values, color=color, linewidth=0.5, alpha=0.3)
        means = values.unfold(0, window, 1).mean(1)
        steps = range(window // 2, window // 2 + len(means))
        cosines.plot(steps, means, color=color, label=tag.removeprefix("cosine/"))
    cosines.axvline(len(run) - LBFGS_STEPS, color="0.5", linewidth=0.8)
    cosines.set_title("Cosines of the task gradients; L-BFGS from the line on", fontsize="medium")
    count_along(cosines, "step")
    legend_beside(cosines)
    return figure


def main(folder: str = "pinn-out") -> None:
    """Train, and draw the solution and the cosines into ``folder``."""
    model, run, after_adam = train()
    drawn = "no figure without matplotlib"
    if Figure is not None:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        draw(model, run).savefig(out / "pinn.png", dpi=150)
        drawn = f"figure in {out}"
    print(f"relative error {after_adam:.1%} after Adam, {relative_error(model):.1%} after L-BFGS; {drawn}")


def cost() -> None:
    """Print the time of a step of Adam with and without surgery."""

    def step_with(backward: Backward) -> Callable[[], object]:
        model, opt, points = build()
        return lambda: adam_step(model, opt, points, backward)

    print(report(measure(step_with)))


if __name__ == "__main__":
    cost() if sys.argv[1:] == ["--cost"] else main(*sys.argv[1:])
