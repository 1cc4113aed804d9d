"""The share of the surgery that each way loses in one step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradkern as gk
from bench.lost.problems import Pass, Problem
from gradkern.aggregators.methods import METHODS

Ways = dict[str, dict[str, Any]]
"""Arguments of ``gradkern.backward`` by name."""
COLUMNS = (16, 64)
"""Columns of the sketches."""


class Update(NamedTuple):
    """The update that a way has written into the shared parameters, a float64 vector, and the step's results."""

    u: Tensor
    info: gk.SurgeryInfo


class Measured(NamedTuple):
    """The figures of one method in one step. Norms of updates are those over the norm of the plain update.

    Attributes:
        surgery: ‖plain - rows‖.
        off: ‖way - rows‖ by way.
        agreement: by way, the share of task pairs that conflict in its Gramian if and only if they do in that of rows.
    """

    surgery: float
    off: dict[str, float]
    agreement: dict[str, float]


def ways(seed: int) -> Ways:
    """Return the ways to measure. Sketches draw new signs at each use."""
    sketches = {f"Sketch({k})": gk.Sketch(k, seed=seed, report=True) for k in COLUMNS}
    return {
        "activations, exact": {"through": "activations"},
        **{name: {"through": "activations", "gramian": sketch} for name, sketch in sketches.items()},
        "features, summed": {"through": "features"},
        "features, per example": {"through": "features", "per_example": True},
    }


def measured(problem: Problem, given: Pass, method: str, step: int, wanted: Ways) -> Measured:
    """Measure the ways on one forward pass, which stays usable. The model's weights stay as they are.

    Args:
        problem: the model, whose parameters have no ``.grad``.
        given: its forward pass.
        method: key of METHODS.
        step: the seed of the method's random choices, which are the same for all ways.
        wanted: the ways.
    """

    def update(way: dict[str, Any]) -> Update:
        if way["through"] == "features":
            way = way | {"features": given.features}
        made = METHODS[method].seeded(step)
        info = gk.backward(given.losses, problem.model, aggregator=made, retain_graph=True, **way)
        return Update(_taken(problem), info)

    rows = update({"through": "rows"})
    _without_surgery(given.losses, method).backward(retain_graph=True)
    plain = _taken(problem)
    others = {name: update(way) for name, way in wanted.items()}
    off = {name: float((other.u - rows.u).norm() / plain.norm()) for name, other in others.items()}
    agreement = {name: _agreement(other.info, rows.info) for name, other in others.items()}
    return Measured(float((plain - rows.u).norm() / plain.norm()), off, agreement)


def _without_surgery(losses: list[Tensor], method: str) -> Tensor:
    """Return the losses' sum with the weights that a method gives to gradients that have nothing to do with each other.

    It is the sum or the mean. Another multiple would count the learning rate as surgery.
    """
    w = METHODS[method].seeded(0).weights(torch.eye(len(losses)))
    return (w * torch.stack(losses)).sum()


def _taken(problem: Problem) -> Tensor:
    """Return the trunk's gradient, and leave none in the model."""
    found = torch.cat([p.grad.flatten().double() for p in problem.trunk.parameters() if p.grad is not None])
    problem.model.zero_grad()
    return found


def _agreement(info: gk.SurgeryInfo, rows: gk.SurgeryInfo) -> float:
    """Return the share of task pairs of whose conflict two Gramians agree."""
    if info.conflict_agreement is not None:
        return float(info.conflict_agreement)
    assert info.gramian is not None
    assert rows.gramian is not None
    i, j = torch.triu_indices(*rows.gramian.shape, 1)
    return float(((info.gramian < 0) == (rows.gramian < 0))[i, j].double().mean())
