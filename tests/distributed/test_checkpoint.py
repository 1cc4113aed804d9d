"""Checkpoints by torch.distributed.checkpoint: a run goes on on other ranks as if it had not been interrupted."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import gradkern as gk
from tests.distributed.jobs import BATCH, Net, T, mesh_of, sharded, whole
from tests.distributed.pool import Pool

STEPS = 6
STOP = 3
TOLERANCE = 1e-12
"""Relative to parameters of about one: the sums over ranks are rounded in another order."""

METHODS: dict[str, Callable[[int], dict[str, Any]]] = {
    "targets": lambda seed: {"aggregator": gk.GradVac(beta=0.5, generator=torch.Generator().manual_seed(seed))},
    "mask": lambda seed: {
        "aggregator": gk.PCGrad(generator=torch.Generator().manual_seed(seed)),
        "suppression": gk.Suppression(0.4, seed=seed),
    },
    "memory": lambda seed: {"aggregator": gk.GradVac(beta=0.5, order=range(T)), "memory": True},
    "smoothed": lambda _: {"aggregator": gk.Smoothed(gk.MGDA())},
    "means": lambda _: {"aggregator": gk.MoCo()},
    "entries": lambda seed: {"aggregator": gk.GradDrop(seed=seed)},
}
"""The arguments of an optimizer whose surgery has a state."""


class Training:
    """A model and its optimizer, whose steps are numbered: one process takes the same steps with the whole batches.

    Args:
        name: a name of ``METHODS``.
        fused: whether the inner optimizer is gradkern's, and steps are updates.
        group: the ranks; False for one process.
        seed: of the model, and of all that draws.
        ranks: the number of ranks on which the parameters are DTensors; 0 if they are none.
    """

    def __init__(self, name: str, fused: bool, group: Any, seed: int, ranks: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net(T).double()
        if ranks > 1:
            sharded(self.model, mesh_of(group, ranks, ""))
        inner = (gk.optim.AdamW if fused else torch.optim.AdamW)(self.model.named_parameters(), lr=1e-2)
        self.opt = gk.SurgeryOptimizer(inner, process_group=group, **METHODS[name](seed))
        self.name, self.fused = name, fused

    def take(self, steps: Iterable[int], rank: int, ranks: int) -> list[Tensor]:
        """Take some steps with a rank's part of their batches, and return the parameters."""
        own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((BATCH, 6), (T, BATCH)))
            losses: list[Any] = [*self.model(x[own], 3 * y[:, own])[:T]]
            if self.name == "memory" and step >= STOP:
                losses[1] = None
            if self.fused:
                self.opt.update(losses, max_norm=1.0)
            else:
                self.opt.zero_grad()
                self.opt.backward(losses)
                self.opt.step()
        return [whole(p.detach()).clone() for p in self.model.parameters()]

    def parts(self, **options: Any) -> dict[str, Any]:
        """Return the states of the model and the optimizer."""
        settings = StateDictOptions(**options)
        model = get_model_state_dict(self.model, options=settings)
        return {"model": model, "opt": get_optimizer_state_dict(self.model, self.opt, options=settings)}

    def load(self, parts: dict[str, Any], **options: Any) -> None:
        """Load such states."""
        settings = StateDictOptions(**options)
        set_model_state_dict(self.model, parts["model"], options=settings)
        set_optimizer_state_dict(self.model, self.opt, parts["opt"], options=settings)


def first_half(rank: int, group: Any, name: str, fused: bool, folder: str, is_sharded: bool = False) -> None:
    """Save a run of four ranks in its middle."""
    run = Training(name, fused, group, 0, 4 * is_sharded)
    run.take(range(STOP), rank, 4)
    dcp.save(run.parts(), checkpoint_id=folder, process_group=group)


def second_half(
    rank: int, group: Any, name: str, fused: bool, folder: str, ranks: int, is_sharded: bool = False
) -> list[Tensor]:
    """Return the parameters of a new run that goes on from there; on one rank, without torch.distributed."""
    run = Training(name, fused, group, 1, ranks * is_sharded)
    parts = run.parts()
    dcp.load(parts, checkpoint_id=folder, process_group=group or None, no_dist=ranks == 1)
    run.load(parts)
    return run.take(range(STOP, STEPS), rank, ranks)


def without_interruption(
    rank: int, group: Any, name: str, fused: bool, ranks: int, is_sharded: bool = False
) -> list[Tensor]:
    return Training(name, fused, group, 0, ranks * is_sharded).take(range(STEPS), rank, ranks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_of_four_ranks_goes_on_on_two_and_on_one(pool: Pool, tmp_path: Path, name: str, fused: bool) -> None:
    pool.run(first_half, name, fused, str(tmp_path), ranks=4)
    expected = without_interruption(0, False, name, fused, 1)
    results = pool.run(second_half, name, fused, str(tmp_path), 2, ranks=2)
    results.append(second_half(0, False, name, fused, str(tmp_path), 1))
    for params in results:
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "fused"), [("targets", True), *((name, False) for name in METHODS)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_run_with_dtensors_goes_on_on_two_ranks_and_on_one(
    pool: Pool, tmp_path: Path, name: str, fused: bool
) -> None:
    """Two ranks have other parts of each parameter; one process has it whole."""
    pool.run(first_half, name, fused, str(tmp_path), True, ranks=4)
    expected = without_interruption(0, False, name, fused, 1)
    results = pool.run(second_half, name, fused, str(tmp_path), 2, True, ranks=2)
    results.append(second_half(0, False, name, fused, str(tmp_path), 1))
    for params in results:
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_on_as_many_ranks_with_the_same_bits(pool: Pool, tmp_path: Path, name: str) -> None:
    pool.run(first_half, name, False, str(tmp_path), ranks=4)
    expected = pool.run(without_interruption, name, False, 4, ranks=4)
    for params, others in zip(pool.run(second_half, name, False, str(tmp_path), 4, ranks=4), expected, strict=True):
        assert all(map(torch.equal, params, others))


def by_rank_0(rank: int, group: Any, name: str, is_sharded: bool) -> list[Tensor]:
    """Return the parameters of a run that goes on from the states that rank 0 has and sends."""
    first = Training(name, False, group, 0, 4 * is_sharded)
    first.take(range(STOP), rank, 4)
    parts = first.parts(full_state_dict=True, cpu_offload=True)
    assert rank == 0 or not parts["opt"]
    run = Training(name, False, group, 1, 4 * is_sharded)
    run.load(parts if rank == 0 else {"model": {}, "opt": {}}, full_state_dict=True, broadcast_from_rank0=True)
    return run.take(range(STOP, STEPS), rank, 4)


@pytest.mark.parametrize(
    ("name", "is_sharded"), [*((name, False) for name in METHODS), ("memory", True), ("means", True)]
)
def test_rank_0_sends_a_whole_checkpoint(pool: Pool, name: str, is_sharded: bool) -> None:
    expected = pool.run(without_interruption, name, False, 4, is_sharded, ranks=4)
    for params, others in zip(pool.run(by_rank_0, name, is_sharded, ranks=4), expected, strict=True):
        assert all(map(torch.equal, params, others))
