"""DTensors: parameters of which each rank holds a part, and the backward passes that reach them.

The leaves of a graph through ``fully_shard`` are gathered weights, which are its own. So gradients of the parameters
come from torch's own backward pass alone, whose hooks reduce them and put them into ``.grad``.
"""

import sys
from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from gradkern.gradients import graph
from gradkern.gradients.engine import raise_explained
from gradkern.gradients.layouts import Row, real_numel

DTensor = Any
"""A ``torch.distributed.tensor.DTensor``, a class that builds of PyTorch without torch.distributed lack."""


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Return whether ``x`` is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before this is imported
    return module is not None and isinstance(x, module.DTensor)


def has_dtensors(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in set(map(type, tensors))


def parts_here(params: list[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, a leaf that shares its memory; ``params`` if none is a DTensor."""
    if not has_dtensors(params):
        return params
    return [_local(p).requires_grad_(p.requires_grad) if is_dtensor(p) else p for p in params]


def grad_here(g: Tensor, p: Tensor) -> Tensor:
    """Return this rank's part of a gradient, placed as its parameter is."""
    if not is_dtensor(p):
        return g
    assert is_dtensor(g), "it is a DTensor's gradient"
    with torch.no_grad():
        return _local(g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements))


def as_dtensor(g: Tensor, p: Tensor) -> Tensor:
    """Return the gradient of ``p`` of which this rank's part is ``g``."""
    if not is_dtensor(p):
        return g
    from torch.distributed.tensor import DTensor

    placed = {"device_mesh": p.device_mesh, "placements": p.placements, "shape": p.shape, "stride": p.stride()}
    return DTensor.from_local(g, run_check=False, **placed)


def is_of_this_rank(x: DTensor) -> bool:
    """Return whether a DTensor's part is this rank's. One that another rank has pickled keeps that rank's place."""
    places = (x.device_mesh.mesh == torch.distributed.get_rank()).nonzero().tolist()
    return places == [list(x.device_mesh.get_coordinate() or ())]


def n_replicas(p: Tensor, n_ranks: int) -> int:
    """Return how many of the ranks hold this rank's part of a parameter: all of them if it is no DTensor."""
    if not is_dtensor(p):
        return n_ranks
    along = zip(p.device_mesh.shape, p.placements, strict=True)
    return n_ranks // prod(n for n, placement in along if not placement.is_replicate())


def place_here(p: Tensor) -> tuple[int, ...]:
    """Return numbers that tell which part of a parameter this rank holds; they are equal where the part is."""
    if not is_dtensor(p):
        return ()
    along = zip(p.device_mesh.get_coordinate(), p.placements, strict=True)
    return tuple([k for k, placement in along if not placement.is_replicate()])


class Box(NamedTuple):
    """Where a rank's part lies in a parameter.

    The numbers of both lie in order: a parameter that is not cut is a vector of its numbers as they lie in memory. The
    numbers of a complex parameter are pairs, which are its last dimension.

    Attributes:
        shape: the parameter's shape.
        firsts: where the part begins in each dimension.
        sizes: the part's shape.
    """

    shape: tuple[int, ...]
    firsts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def start(self) -> int | None:
        """The position of the part in the parameter; None if its numbers are not neighbours there."""
        cut = [k for k, size in enumerate(self.sizes) if size != self.shape[k]]
        if cut and prod(self.sizes[: cut[-1]]) > 1:
            return None
        return sum(first * prod(self.shape[k + 1 :]) for k, first in enumerate(self.firsts))


def box_here(p: Tensor) -> Box | None:
    """Return where this rank's part lies in a parameter; None if the numbers of a DTensor do not lie in order."""
    n = real_numel(p)
    if not is_dtensor(p) or all(placement.is_replicate() for placement in p.placements):
        return Box((n,), (0,), (n,))
    if not p.is_contiguous():
        return None
    firsts, sizes = _cut_here(p)
    return Box((*p.shape, 2), (*firsts, 0), (*sizes, 2)) if p.is_complex() else Box(tuple(p.shape), firsts, sizes)


def _cut_here(p: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where this rank's part begins in each dimension of a DTensor, and its size there."""
    (chunk,) = p.__create_chunk_list__()  # what torch.distributed.checkpoint asks it for
    return tuple(chunk.offsets), tuple(chunk.sizes)


def whole_grad(g: Tensor, p: Tensor) -> Tensor:
    """Return the gradient of ``p`` of which this rank's part is ``g``. All ranks of a DTensor must call it.

    The gradient of a complex parameter is pairs of real numbers, and so is its part.
    """
    if not is_dtensor(p):
        return g
    dtensor: DTensor = as_dtensor(torch.view_as_complex(g) if p.is_complex() else g, p)
    whole: Tensor = dtensor.full_tensor()
    return torch.view_as_real(whole) if p.is_complex() else whole


def part_of(g: Tensor, p: Tensor) -> Tensor:
    """Return this rank's part of a whole gradient of ``p``, as :func:`whole_grad` returns it."""
    if not is_dtensor(p):
        return g
    for k, (first, size) in enumerate(zip(*_cut_here(p), strict=True)):
        g = g.narrow(k, first if size else 0, size)
    return g.clone()


def is_first_replica(p: Tensor, rank: int, first: int) -> bool:
    """Return whether this rank is the first of those that hold its part of a parameter.

    Args:
        p: the parameter.
        rank: the number of this rank among those of the step.
        first: the number of the step's first rank in the default group. Among several meshes its own one counts.
    """
    if not is_dtensor(p):
        return rank == 0
    if first not in p.device_mesh.mesh:
        return False
    coordinate = zip(p.device_mesh.get_coordinate(), p.placements, strict=True)
    return all(k == 0 for k, placement in coordinate if placement.is_replicate())


def refuse_meshes(params: Sequence[tuple[str, Tensor]], ranks: Collection[int]) -> None:
    """Raise unless DTensors lie on the ranks of a step, and are whole there.

    Some may lie on a part of the mesh that others lie on, and on each such part alike.

    Args:
        params: parameters with their names.
        ranks: the global numbers of the ranks.
    """
    dtensors = [(name, p) for name, p in params if is_dtensor(p)]
    meshes = {p.device_mesh: set(p.device_mesh.mesh.flatten().tolist()) for _, p in dtensors}
    covered = set().union(*meshes.values())
    for name, p in dtensors:
        of_mesh = meshes[p.device_mesh]
        if covered != set(ranks) or (of_mesh != covered and covered not in meshes.values()):
            raise ValueError(
                f"process_group has the ranks {sorted(ranks)}, but {name} in params is a DTensor on the ranks "
                f"{sorted(of_mesh)}: give the group of its device mesh, or make it on all ranks of the step"
            )
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"{name} in params is a DTensor of sums that are not added up, {p.placements}")
        if p._post_accumulate_grad_hooks:
            raise NotImplementedError(
                f"{name} in params is a DTensor with a post-accumulate hook, which would see each task's gradient"
            )


def refuse_gathered(argument: str, module: nn.Module) -> None:
    """Raise ValueError if a Module shows weights that ``fully_shard`` has gathered, which get no ``.grad``."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for m in () if fsdp is None else module.modules():
        if isinstance(m, getattr(fsdp, "FSDPModule", ())) and not all(map(is_dtensor, m.parameters())):
            raise ValueError(
                f"{argument} is a Module with tensors under fully_shard that are no DTensors: its weights are gathered "
                "between forward and backward pass. Take list(model.named_parameters()) before the first forward pass"
            )


def differentiated_by_hooks(
    name: str, outputs: tuple[Tensor, ...], targets: Sequence[Tensor], retain_graph: bool, grads: tuple[Tensor, ...]
) -> Row:
    """Return this rank's parts of the gradients that torch's own backward pass puts into ``.grad``.

    Every ``.grad`` is as before then, whatever raises. Arguments are those of
    :func:`gradkern.gradients.engine.differentiated`.
    """
    for x in outputs:
        if is_dtensor(x):
            raise TypeError(f"{name} must not be a DTensor: pass its full_tensor()")
    leaves = {leaf for x in outputs for leaf in graph.leaves(x)}
    aside = [(p, p.grad) for p in {*targets, *leaves}]
    try:
        for p, _ in aside:
            p.grad = None
        torch.autograd.backward(outputs, grads, retain_graph=retain_graph)
        found = [p.grad for p in targets]
    except RuntimeError as error:
        raise_explained(name, outputs, error)
        raise
    finally:
        for p, g in aside:
            p.grad = g
    if any(g is None and p in leaves and not is_dtensor(p) for g, p in zip(found, targets, strict=True)):
        raise ValueError(
            "params holds weights that fully_shard has gathered, whose gradients it takes away: take the parameters "
            "before the first forward pass"
        )
    return [None if g is None else grad_here(g, p) for g, p in zip(found, targets, strict=True)]


def _local(x: DTensor) -> Tensor:
    with torch.no_grad():
        local: Tensor = x.to_local()
        return local.detach()
