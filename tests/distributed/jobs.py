"""Training runs, which ranks take with their parts of a batch, and one process with the whole batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradkern as gk
from gradkern.aggregators.methods import METHODS as TABLE
from tests.models import MultiHead

BATCH = 24
"""The number of examples, a multiple of all numbers of ranks."""
T = 3

METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "Sum": gk.Sum,
    "Sum, report": lambda: gk.Sum(report=True),
    "RLW": gk.RLW,
    "Uncertainty": lambda: gk.Uncertainty(T),
    "Uncertainty, report": lambda: gk.Uncertainty(T, report=True),
    "GeometricMean": gk.GeometricMean,
    "PCGrad": gk.PCGrad,
    "PCGrad, generator": lambda: gk.PCGrad(generator=torch.Generator().manual_seed(7)),
    "GradVac": gk.GradVac,
    "MGDA": gk.MGDA,
    "UPGrad": gk.UPGrad,
    "GradAttention": lambda: gk.GradAttention(subset=50),
    "GradAttention of a subset": lambda: gk.GradAttention(subset=50, update="subset"),
    "Smoothed PCGrad": lambda: gk.Smoothed(gk.PCGrad()),
}


class Run(NamedTuple):
    """The kind of a run.

    Attributes:
        method: a name of ``METHODS``.
        dtype: of the parameters.
        steps: the number of steps.
        ddp: whether the model is in DistributedDataParallel.
        unused: whether that looks for unused parameters.
        update: whether steps are ``update(max_norm=1)``, else ``backward`` and ``step``.
        callables: whether losses are callables.
        accumulate: whether a step has two micro-batches.
        features: whether the trunk's output is given.
        second: whether steps have a second batch, the first one with other targets.
        options: more arguments of the optimizer; a name of ``OPTIONS``.
        sharding: a name of ``SHARDINGS``.
        fused: whether the inner optimizer is gradkern's, as with ``update``.
        shard: whether each rank has the state of some rows alone.
        finish: how a step through activations ends; "" for a step through rows. One process goes through rows.
    """

    method: str = "PCGrad"
    dtype: torch.dtype = torch.float64
    steps: int = 5
    ddp: bool = False
    unused: bool = False
    update: bool = False
    callables: bool = False
    accumulate: bool = False
    features: bool = False
    second: bool = False
    options: str = ""
    sharding: str = ""
    fused: bool = False
    shard: bool = False
    finish: str = ""


OPTIONS: dict[str, Callable[[MultiHead], dict[str, Any]]] = {
    "": lambda _: {},
    "parameter": lambda _: {"groups": "parameter"},
    "module": lambda _: {"groups": "module"},
    "shared": lambda model: {"shared": list(model.trunk[2].parameters())},
    "suppression": lambda _: {"suppression": gk.Suppression(0.4, seed=3)},
    "suppression of all": lambda _: {"suppression": gk.Suppression(0.4, block=2, scope="all", seed=3)},
    "suppression in blocks": lambda _: {"suppression": gk.Suppression(0.4, block=4, seed=3)},
    "conflict_lr": lambda _: {"conflict_lr": gk.ConflictLR()},
}


class Result(NamedTuple):
    """The result of a run: parameters, and of each step the losses, Gramian, weights and the optimizer's state."""

    params: list[Tensor]
    infos: list[gk.SurgeryInfo]
    state: dict[str, Any]


class Net(MultiHead):
    """The model, with the losses as its result, as DistributedDataParallel needs it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return the losses, and the features."""
        h = self.trunk(x)
        losses = [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]
        return (*losses, h)


def sharded(model: nn.Module, mesh: DeviceMesh, **kwargs: Any) -> None:
    """Shard the trunk's layers, a head and the rest, each by itself; a part of some parameters is empty."""
    for module in (model.trunk[0], model.trunk[2], model.heads[0], model):
        fully_shard(module, mesh=mesh, **kwargs)
    register_fsdp_forward_method(model, "loss")


def kept_gathered(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the model, whose weights stay gathered until the step's end."""
    sharded(model, mesh)
    model.set_reshard_after_backward(False)


def of_root(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the model as one."""
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")


def heads_left_out(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the trunk alone."""
    fully_shard(model.trunk, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the trunk's first layer by columns and its second by rows; the heads are whole on all ranks."""
    parallelize_module(model.trunk, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel_shards(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the trunk's layers along one dimension of the mesh, and shard all parameters along the other."""
    tensor_parallel(model, mesh["parts"])
    sharded(model, mesh["shards"])


SHARDINGS: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "resharded": sharded,
    "kept": lambda model, mesh: sharded(model, mesh, reshard_after_forward=False),
    "gathered": kept_gathered,
    "of root": of_root,
    "heads left out": heads_left_out,
    "replicas": sharded,
    "columns": lambda model, mesh: sharded(model, mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1)),
    "tensor parallel shards": tensor_parallel_shards,
    "tensor parallel": tensor_parallel,
}


def mesh_of(group: Any, ranks: int, sharding: str) -> DeviceMesh:
    """Return a mesh of the ranks of a group; with replicas it has two rows."""
    if sharding == "tensor parallel shards":
        return init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("shards", "parts"))
    if sharding == "replicas":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards"))
    return DeviceMesh.from_group(group or torch.distributed.group.WORLD, "cpu")


def whole(p: Tensor) -> Tensor:
    """Return a whole tensor of a DTensor's parts."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def trained(rank: int, group: Any, run: Run, ranks: int) -> Result:
    """Return the result of a run with this rank's part of each batch; the whole batch with one rank."""
    torch.manual_seed(0)
    model = Net(T, 12 if run.sharding == "tensor parallel" else 10).to(run.dtype)  # 12 is a multiple of all numbers
    method = METHODS[run.method]() if run.method in METHODS else TABLE[run.method].seeded(7)
    params = [*model.named_parameters(), *((f"method.{name}", p) for name, p in method.named_parameters())]
    forward: nn.Module = model
    if run.sharding and ranks > 1:
        SHARDINGS[run.sharding](model, mesh_of(group, ranks, run.sharding))
        params = [*model.named_parameters(), *params[len(list(model.parameters())) :]]
    inner = (gk.optim.AdamW if run.update or run.fused else torch.optim.AdamW)(params, lr=1e-2)
    ranked = {"process_group": group if ranks > 1 else False, "shard_optimizer": run.shard}
    way = {"through": "activations", "finish": run.finish} if run.finish and ranks > 1 else {}
    opt = gk.SurgeryOptimizer(inner, method, **ranked, **way, **OPTIONS[run.options](model))
    batches = [(torch.randn(BATCH, 6).to(run.dtype), 3 * torch.randn(T, BATCH).to(run.dtype)) for _ in range(run.steps)]
    if (run.ddp or run.unused) and ranks > 1:
        forward = DistributedDataParallel(model, process_group=group, find_unused_parameters=run.unused)
    torch.manual_seed(5 if rank == 0 else 100 + rank)  # the numbers drawn are those of rank 0
    infos = []
    for x, y in batches:
        own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        own = slice(0, BATCH) if run.sharding == "tensor parallel" else own
        if run.sharding == "tensor parallel shards":  # pairs of ranks have the same part
            own = slice(rank // 2 * 2 * BATCH // ranks, (rank // 2 + 1) * 2 * BATCH // ranks)
        infos.append(_step(run, opt, model, forward, x[own], y[:, own]))
        for module in model.modules():
            if run.sharding == "gathered" and isinstance(module, FSDPModule):
                module.reshard()
    state = opt.state_dict() if not run.sharding and not run.shard else {"surgery": opt.state_dict()["surgery"]}
    return Result([whole(p.detach()) for _, p in params], infos, state)


def _step(run: Run, opt: gk.SurgeryOptimizer, model: Net, forward: nn.Module, x: Tensor, y: Tensor) -> gk.SurgeryInfo:
    opt.zero_grad()
    if run.accumulate:
        with opt.accumulate() as total:
            for part in (slice(0, len(x) // 2), slice(len(x) // 2, len(x))):
                opt.backward([loss / 2 for loss in forward(x[part], y[:, part])[:T]])
        opt.step()
        assert total.info is not None
        return total.info
    losses: Sequence[Any]
    kwargs: dict[str, Any] = {}
    if run.callables:
        losses = [lambda t=t: model.loss(t, x, y) for t in range(T)]
    else:
        *losses, h = forward(x, y)
        kwargs = {"features": h} if run.features else {}
    if run.update:
        return opt.update(losses, max_norm=1.0, **kwargs)
    if run.second:
        kwargs["second"] = model(x, -y)[:T]
    info = opt.backward(losses, **kwargs)
    opt.step()
    return info
