"""Advice on several ranks is of one rank's step: it sends nothing, so that a rank may ask for it alone."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from tests.distributed.jobs import SHARDINGS, Net, T, mesh_of
from tests.distributed.pool import Pool


class Advised(NamedTuple):
    """What a rank has after a step, and what it was told before."""

    grads: list[Tensor]
    statuses: dict[str, str] | None


def after_advice(rank: int, group: Any, asking: bool) -> Advised:
    """Take a step through DistributedDataParallel; with ``asking`` rank 0 asks for advice before."""
    torch.manual_seed(0)
    model = Net(T)
    forward = DistributedDataParallel(model, process_group=group)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.GradVac(), process_group=group)
    torch.manual_seed(rank)
    *losses, _ = forward(torch.randn(8, 6), torch.randn(T, 8))
    advice = opt.advise(losses) if asking and rank == 0 else None
    opt.backward(losses)
    statuses = None if advice is None else {cost.name: cost.status for cost in advice.rows}
    return Advised([p.grad for p in model.parameters() if p.grad is not None], statuses)


def test_one_rank_may_ask_alone_and_the_step_stays_the_same(pool: Pool) -> None:
    asked, others = pool.run(after_advice, True, ranks=2), pool.run(after_advice, False, ranks=2)
    assert asked[0].statuses is not None
    assert asked[0].statuses["rows"] == "measured"
    for a, b in zip(asked, others, strict=True):
        assert len(a.grads) > 0
        assert all(map(torch.equal, a.grads, b.grads))


def of_dtensors(rank: int, group: Any) -> str:
    """Ask for advice on DTensors."""
    model = Net(T)
    SHARDINGS["resharded"](model, mesh_of(group, 2, "resharded"))
    params = list(model.named_parameters())
    losses = [model.loss(t, torch.randn(8, 6), torch.randn(T, 8)) for t in range(T)]
    with pytest.raises(NotImplementedError) as raised:
        gk.advise(losses, params, aggregator=gk.PCGrad())
    return str(raised.value)


def test_there_is_no_advice_on_dtensors(pool: Pool) -> None:
    for text in pool.run(of_dtensors, ranks=2):
        assert "advise is not for DTensors in params" in text
