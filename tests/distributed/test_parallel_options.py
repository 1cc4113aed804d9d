"""Options of FSDP2 and of tensor parallelism: mixed precision, offloading, parallel sequences, and complex numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradkern as gk
from gradkern.reference.projections import pcgrad
from tests.distributed.jobs import Net, T, mesh_of, sharded, whole
from tests.distributed.pool import Pool
from tests.distributed.test_tasks import data, part

STEPS = 3
TOLERANCE = 1e-12
"""Of float64 sums over examples and ranks in another order, a few roundings of numbers around 1."""


def mixed(rank: int, group: Any, reduce_dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the trunk's task gradients as plain FSDP2 gives them, one pass for each; those of a step; its Gramian."""
    torch.manual_seed(0)
    model = Net(T)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    sharded(model, mesh_of(group, 2, ""), mp_policy=policy)
    trunk = list(model.trunk.parameters())
    torch.manual_seed(rank)
    x, y = torch.randn(8, 6), 3 * torch.randn(T, 8).bfloat16()
    rows = []
    for t in range(T):
        model(x, y)[t].backward()
        rows.append(torch.cat([whole(p.grad).flatten() for p in trunk]))  # type: ignore[arg-type]
        model.zero_grad()
    params = list(model.parameters())
    info = gk.backward(list(model(x, y)[:T]), params, aggregator=gk.PCGrad(order=range(T)), process_group=group)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in params)
    assert info.gramian is not None
    return rows, [whole(p.grad) for p in trunk], info.gramian  # type: ignore[arg-type]


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_mixed_precision_combines_the_rows_that_fsdp2_gives(pool: Pool, reduce_dtype: torch.dtype | None) -> None:
    """Weights and activations are bfloat16; the rows and their arithmetic are float32."""
    for rows, grads, M in pool.run(mixed, reduce_dtype, ranks=2):
        expected = sum(pcgrad(rows, [range(T)] * T))
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]).double(), expected, rtol=1e-5, atol=1e-6)
        J = torch.stack(rows)
        torch.testing.assert_close(M, J @ J.T, rtol=1e-5, atol=1e-6)


def offloaded(rank: int, group: Any) -> list[Tensor]:
    """Return the parameters after some steps, of which the shards stay on the CPU."""
    torch.manual_seed(0)
    model = Net(T).double()
    if group is not False:
        sharded(model, mesh_of(group, 2, ""), offload_policy=CPUOffloadPolicy(pin_memory=False))
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), gk.MGDA(), process_group=group)
    for step in range(STEPS):
        x, y = data(step) if group is False else part(rank, 2, *data(step))
        opt.zero_grad()
        opt.backward(list(model(x, y)[:T]))
        opt.step()
    return [whole(p.detach()) for p in model.parameters()]


def test_shards_that_are_offloaded(pool: Pool) -> None:
    expected = offloaded(0, False)
    for params in pool.run(offloaded, ranks=2):
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=TOLERANCE, atol=TOLERANCE)


class Sequences(nn.Module):
    """A normalized trunk on sequences, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(T))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the losses of sequences (B, S, 6) with targets (T, B, S)."""
        h = self.trunk(self.norm(x))
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]


def on_sequences(rank: int, group: Any, name: str, ranks: int) -> tuple[list[Tensor], Tensor]:
    """Return the parameters after some steps, and the last Gramian; each rank normalizes a part of each sequence."""
    torch.manual_seed(0)
    model = Sequences().double()
    if ranks > 1:
        plan = {
            "norm": SequenceParallel(),
            "trunk.0": ColwiseParallel(input_layouts=Shard(1)),
            "trunk.2": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, mesh_of(group, ranks, ""), plan)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = gk.aggregator(name)
    opt = gk.SurgeryOptimizer(inner, method, groups="parameter", process_group=group if ranks > 1 else False)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x, y = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((4, 4, 6), (T, 4, 4)))
        opt.zero_grad()
        info = opt.backward(model(x.chunk(ranks, 1)[rank], 3 * y))
        opt.step()
    assert info.gramian is not None
    return [whole(p.detach()) for p in model.parameters()], info.gramian


@pytest.mark.parametrize(("name", "ranks"), [("mgda", 2), ("upgrad", 4)])
def test_parallel_sequences(pool: Pool, name: str, ranks: int) -> None:
    """The norm's weights are whole on all ranks, and come with gradients that are not added up."""
    expected, expected_gramian = on_sequences(0, None, name, 1)
    for params, M in pool.run(on_sequences, name, ranks, ranks=ranks):
        torch.testing.assert_close(M, expected_gramian, rtol=1e-10, atol=1e-10)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)  # AdamW divides by roots of small numbers


class Complex(nn.Module):
    """A trunk and heads of complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 5, dtype=torch.complex128)
        self.heads = nn.ModuleList(nn.Linear(5, 1, dtype=torch.complex128) for _ in range(T))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return the losses."""
        h = self.trunk(x.to(torch.complex128))
        return [
            (head(h).squeeze(-1) - target).abs().square().mean() for head, target in zip(self.heads, y, strict=True)
        ]


def on_complex(rank: int, group: Any, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters after some steps, of which the last may lack a task, and what the optimizer keeps."""
    torch.manual_seed(0)
    model = Complex()
    if group is not False:
        fully_shard(model, mesh=mesh_of(group, 2, ""))
    params = list(model.parameters())
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.1), process_group=group, **COMPLEX[name]())
    for step in range(STEPS):
        x, y = data(step) if group is False else part(rank, 2, *data(step))
        losses: list[Any] = model(x, y)
        if step == STEPS - 1 and name == "memory":
            losses[1] = None
        opt.zero_grad()
        opt.backward(losses)
        opt.step()
    state = opt.state_dict()["surgery"]
    kept = [*state["state"].values(), *(g for row in state["memory"] or () for g in row)]
    return [whole(p.detach()) for p in params], [x for x in kept if isinstance(x, Tensor)]


COMPLEX: dict[str, Callable[[], dict[str, Any]]] = {
    "memory": lambda: {"aggregator": gk.PCGrad(order=range(T)), "memory": True},
    "mask": lambda: {"aggregator": gk.PCGrad(order=range(T)), "suppression": gk.Suppression(0.4, block=4, seed=3)},
    "entries": lambda: {"aggregator": gk.GradDrop(seed=3)},
    "means": lambda: {"aggregator": gk.MoCo()},
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_dtensors(pool: Pool, name: str) -> None:
    expected = on_complex(0, False, name)
    for results in pool.run(on_complex, name, ranks=2):
        for tensors, others in zip(results, expected, strict=True):
            for p, q in zip(tensors, others, strict=True):
                torch.testing.assert_close(p, q, rtol=TOLERANCE, atol=TOLERANCE)
