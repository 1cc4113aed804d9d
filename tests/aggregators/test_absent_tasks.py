"""Tasks that are absent from a step without a memory: the others have the update that they have among themselves."""

from collections.abc import Callable

import pytest
import torch

import gradkern as gk
from tests.models import problem
from tests.tolerances import assert_near

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "PCGrad": lambda: gk.PCGrad("average"),
    "MGDA": gk.MGDA,
    "CAGrad": gk.CAGrad,
    "UPGrad": gk.UPGrad,
    "DualProj": gk.DualProj,
    "PCD": gk.PCD,
    "IMTLG": gk.IMTLG,
    "AlignedMTL": gk.AlignedMTL,
    "ConFIG": gk.ConFIG,
    "NashMTL": gk.NashMTL,
    "FairGrad": gk.FairGrad,
    "NTKMTL": gk.NTKMTL,
    "Normalized": lambda: gk.Normalized(gk.UPGrad()),
    "Smoothed": lambda: gk.Smoothed(gk.UPGrad()),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_others_are_as_if_they_were_alone(name: str) -> None:
    model, x, y = problem()
    trunk = list(model.trunk.parameters())
    updates = []
    for with_absent in (False, True):
        losses = model.losses(x, y)[:2] + [None] * with_absent
        model.zero_grad()
        gk.backward(losses, trunk, aggregator=METHODS[name]())
        updates.append(torch.cat([p.grad.flatten() for p in trunk]))
    # Float32 gradients whose few dot products are rounded alike but for their order.
    assert_near(updates[1], updates[0], updates[0].norm(), 1e-5)


@pytest.mark.parametrize("name", {**METHODS, "GradVac": gk.GradVac})
def test_a_memory_changes_the_update_of_pcgrad_and_gradvac_only(name: str) -> None:
    updates = []
    for memory in (False, True):
        model, x, y = problem()
        method = gk.GradVac(order=[0, 1, 2]) if name == "GradVac" else METHODS[name]()
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        opt = gk.SurgeryOptimizer(inner, method, shared=model.trunk, memory=memory)
        for conflict in (1, -1):  # in the second step the first two tasks conflict with the absent one
            opt.zero_grad()
            losses = [conflict * loss for loss in model.losses(x, y)]
            opt.backward(losses if conflict == 1 else [*losses[:2], None])
        updates.append(torch.cat([p.grad.flatten() for p in model.trunk.parameters()]))
    assert torch.equal(*updates) == (name not in ("PCGrad", "GradVac"))


def test_what_is_kept_of_an_absent_task_waits() -> None:
    model, x, y = problem()
    method = gk.Smoothed(gk.UPGrad())
    gk.backward(model.losses(x, y), model, aggregator=method)
    (name,) = (key for key in method.state_dict() if not key.endswith("_extra_state"))
    before = method.state_dict()[name].clone()
    gk.backward([*(2 * loss for loss in model.losses(x, y)[:2]), None], model, aggregator=method)
    assert method.state_dict()[name][..., 2].tolist() == before[..., 2].tolist()


@pytest.mark.parametrize("make", [gk.Smoothed, gk.Normalized])
def test_a_task_that_the_method_within_needs_is_needed(make: Callable[[gk.Aggregator], gk.Aggregator]) -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match=r"losses\[0\] must be given in every step"):
        gk.backward([None, *model.losses(x, y)[1:]], model, aggregator=make(gk.PCD()))
