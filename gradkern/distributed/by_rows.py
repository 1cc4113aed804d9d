"""Parameters that are whole on all ranks, and whose optimizer's state is cut by rows: each rank has that of some rows.

The cut is that of a DTensor with ``Shard(0)``: the ranks have as many rows each, the last ones fewer. So the state is
kept as DTensors. ``torch.distributed.checkpoint`` saves their parts, puts them together, and loads them on other ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.distributed.buckets import Buckets, buckets_of
from gradkern.distributed.comm import Comm, ProcessGroup, comm_of
from gradkern.distributed.reduction import in_memory
from gradkern.gradients.sharded import is_dtensor, n_replicas


def n_rows(p: Tensor, R: int) -> int:
    """Return the number of rows of a parameter that R ranks cut; 0 if they leave it whole, as they do a DTensor.

    One with fewer rows than ranks is left whole, and one whose rows are not vectors of its memory.
    """
    if is_dtensor(p) or p.dim() == 0 or p.shape[0] < R or p.numel() == 0:
        return 0
    rows = p.shape[0]
    return rows if p.stride(0) == p.numel() // rows else 0


def like_rows(vector: Tensor, p: Tensor) -> Tensor:
    """Return the numbers of some rows of a parameter, laid out as they are there."""
    per_row = p.numel() // p.shape[0]
    return vector.as_strided((vector.numel() // per_row, *p.shape[1:]), p.stride(), vector.storage_offset())


def cut_of(process_group: ProcessGroup | bool | None, last: "ByRows | None") -> "ByRows | None":
    """Return the cut among the ranks that :func:`gradkern.distributed.comm.comm_of` finds; None for one rank.

    Args:
        process_group: as there.
        last: the cut of the last step, which is returned if the ranks are the same.
    """
    comm = comm_of(process_group)
    if comm is None:
        return None
    return last if last is not None and last.comm is comm else ByRows(comm)


class ByRows:
    """The cut of parameters among the ranks of a step.

    Args:
        comm: the ranks.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._meshes: dict[str, Any] = {}  # they hold the process group, and the optimizer holds them

    def cuts(self, p: Tensor) -> bool:
        """Return whether a parameter's state is cut."""
        return n_rows(p, self.comm.size) > 0

    def here(self, x: Tensor, p: Tensor) -> Tensor:
        """Return this rank's rows of ``x``, a tensor like ``p`` or these rows alone; ``x`` if ``p`` is not cut."""
        if not self.cuts(p) or x.shape != p.shape:
            return x
        rows = p.shape[0]
        each = -(-rows // self.comm.size)
        first = min(self.comm.rank * each, rows)
        return x.detach()[first : min(first + each, rows)]

    def all_here(self, tensors: Sequence[Any], params: Sequence[Tensor]) -> list[Tensor]:
        """Return :meth:`here` of each tensor and its parameter."""
        return [self.here(x, p) for x, p in zip(tensors, params, strict=True)]

    def replicas(self, p: Tensor) -> int:
        """Return the number of ranks that have this rank's part of a parameter's state."""
        return 1 if self.cuts(p) else n_replicas(p, self.comm.size)

    def placed(self, part: Tensor, p: Tensor) -> Tensor:
        """Return the DTensor like ``p`` of which this rank has the rows ``part``."""
        from torch.distributed.tensor import DTensor, Shard

        mesh = self._mesh(p.device.type)
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())

    def fits(self, x: Tensor, p: Tensor) -> bool:
        """Return whether ``x``, a tensor like ``p``, is cut as :meth:`placed` cuts it, or whole if ``p`` is not cut."""
        if not self.cuts(p):
            return is_dtensor(x) == is_dtensor(p)
        return is_dtensor(x) and x.device_mesh == self._mesh(p.device.type) and x.placements[0].is_shard(0)

    def _mesh(self, device: str) -> Any:
        """Return the ranks as a ``DeviceMesh`` of devices of a type."""
        from torch.distributed.device_mesh import DeviceMesh

        if device not in self._meshes:
            self._meshes[device] = DeviceMesh.from_group(self.comm.group, device)
        return self._meshes[device]

    def gather(self, params: Sequence[Tensor]) -> None:
        """Write the rows of all ranks to those of the parameters that are cut."""
        params = [p.detach() for p in params if self.cuts(p)]
        if not params:
            return
        device, buckets = params[0].device, self._buckets_of(params)
        key = "rows", buckets, device
        own, whole = self.comm.taken(key) or (
            [torch.empty(b.shard, dtype=b.dtype, device=device) for b in buckets],
            [torch.empty(b.size, dtype=b.dtype, device=device) for b in buckets],
        )
        pieces = buckets.pieces(self.comm.rank)
        torch._foreach_copy_(
            [own[piece.bucket][piece.at : piece.at + piece.numel] for piece in pieces],
            [in_memory(params[piece.place])[piece.offset : piece.offset + piece.numel] for piece in pieces],
        )
        for work in [self.comm.all_gather(x, shard) for x, shard in zip(whole, own, strict=True)]:
            work.wait()
        for bucket, x in zip(buckets, whole, strict=True):
            torch._foreach_copy_(
                [in_memory(params[run.place])[run.offset : run.offset + run.numel] for run in bucket.runs],
                [x[run.start : run.start + run.numel] for run in bucket.runs],
            )
        if device.type == "cpu":  # as in Reduction
            self.comm.keep(key, (own, whole))

    def _buckets_of(self, params: Sequence[Tensor]) -> Buckets:
        R = self.comm.size
        numels, dtypes = tuple([p.numel() for p in params]), tuple([p.dtype for p in params])
        return buckets_of(tuple(range(len(params))), numels, dtypes, tuple([n_rows(p, R) for p in params]), R, 1)
