"""What finish="kept" takes besides: groups, other shared parameters, and suppression of the update."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.models import MultiHead, flat, problem, task_gradients
from tests.step.activations.truth import FINISHES, NEAR
from tests.tolerances import assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
PCGRAD = gk.PCGrad(order=ORDER)

pytestmark = pytest.mark.usefixtures("float64_by_default")


def step(finish: str = "kept", **arguments: Any) -> tuple[MultiHead, list[Tensor], Any]:
    """Take a step of a new model; return it, its losses with their graphs, and what the step returned."""
    model, x, y = problem()
    losses = model.losses(x, y)
    arguments = {
        name: value(model) if callable(value) and name == "shared" else value for name, value in arguments.items()
    }
    info = gk.backward(
        losses, model, aggregator=PCGRAD, through="activations", finish=finish, retain_graph=True, **arguments
    )
    return model, losses, info


def rows_of(losses: list[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    return [flat(row, params) for row in task_gradients(losses, params)]


def assert_surgery(losses: list[Tensor], params: Sequence[Tensor]) -> None:
    rows = rows_of(losses, params)
    scale = sum(row.norm() for row in rows)
    assert_near(flat([p.grad for p in params], params), reference.pcgrad_update(rows, ORDER), scale, NEAR)


def assert_plain(losses: list[Tensor], params: Sequence[Tensor]) -> None:
    if not params:
        return
    rows = rows_of(losses, params)
    assert_near(flat([p.grad for p in params], params), sum(rows), sum(row.norm() for row in rows), NEAR)


GROUPS: dict[str, tuple[Any, Callable[[str], object]]] = {
    "parameter": ("parameter", lambda name: name),
    "module": ("module", lambda name: name.rpartition(".")[0]),
    "by name": (lambda name: name.endswith("bias"), lambda name: name.endswith("bias")),
}


@pytest.mark.parametrize("name", GROUPS)
def test_each_group_is_a_problem_of_its_own(name: str) -> None:
    groups, group_of = GROUPS[name]
    model, losses, info = step(groups=groups)
    members: dict[object, list[Tensor]] = {}
    for of_name, p in model.named_parameters():
        members.setdefault(group_of(of_name), []).append(p)
    assert list(info.groups) == list(members)
    trunk = set(model.trunk.parameters())
    for group, M in zip(info.groups, info.gramian, strict=True):
        shared = [p for p in members[group] if p in trunk]
        if shared:
            assert_surgery(losses, shared)
            rows = rows_of(losses, shared)
            assert_near(M, reference.gramian(rows), max(row.norm() for row in rows) ** 2, NEAR)
        else:
            assert M.abs().max() == 0
    assert_plain(losses, list(model.heads.parameters()))


SHARED: dict[str, Callable[[MultiHead], list[Tensor]]] = {
    "the last layer": lambda m: list(m.trunk[2].parameters()),
    "the first layer": lambda m: list(m.trunk[0].parameters()),
    "a weight": lambda m: [m.trunk[2].weight],
    "a bias": lambda m: [m.trunk[0].bias],
    "a head too": lambda m: [*m.trunk.parameters(), *m.heads[0].parameters()],
    "heads alone": lambda m: list(m.heads.parameters()),
    "all": lambda m: list(m.parameters()),
}


@pytest.mark.filterwarnings("ignore:there is no surgery")  # of heads alone
@pytest.mark.parametrize("name", SHARED)
def test_shared_names_the_parameters_under_surgery(name: str) -> None:
    model, losses, info = step(shared=SHARED[name])
    shared = SHARED[name](model)
    assert_surgery(losses, shared)
    assert_plain(losses, [p for p in model.parameters() if all(p is not q for q in shared)])
    rows = rows_of(losses, shared)
    assert_near(info.gramian, reference.gramian(rows), max(row.norm() for row in rows) ** 2, NEAR)


@pytest.mark.parametrize("finish", FINISHES)
def test_shared_may_name_what_two_losses_reach(finish: str) -> None:
    model, losses, _ = step(finish, shared=lambda m: list(m.trunk.parameters()))
    assert_surgery(losses, list(model.trunk.parameters()))
    assert_plain(losses, list(model.heads.parameters()))


@pytest.mark.parametrize("finish", FINISHES)
def test_one_group_may_be_named(finish: str) -> None:
    model, losses, _ = step(finish, groups="model")
    assert_surgery(losses, list(model.trunk.parameters()))


@pytest.mark.parametrize("block", [1, 4])
def test_suppression_of_the_update(block: int) -> None:
    model, losses, info = step(suppression=gk.Suppression(0.45, block, seed=11))
    trunk = list(model.trunk.parameters())
    numels = [p.numel() for p in model.parameters()]
    firsts = reference.first_units(numels, block)
    keep = torch.cat(
        [reference.kept(11, 0, 0.45, block, first, p.numel()) for first, p in zip(firsts, trunk, strict=False)]
    )
    rows = rows_of(losses, trunk)
    expected = reference.suppressed(rows, keep, "update", lambda given: reference.pcgrad(given, ORDER))
    got = flat([p.grad for p in trunk], trunk)
    assert_near(got, expected, sum(row.norm() for row in rows), NEAR)
    assert torch.equal(got == 0, expected == 0)
    assert_plain(losses, list(model.heads.parameters()))
    assert_near(info.gramian, reference.gramian(rows), max(row.norm() for row in rows) ** 2, NEAR)
    assert float(info.kept) == pytest.approx(float(keep.double().mean()), rel=1e-6)  # it is float32
