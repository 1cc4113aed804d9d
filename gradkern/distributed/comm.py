"""The ranks that take a step together, and the collectives between them."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor

from gradkern.arguments import shown

ProcessGroup = Any
"""A ``torch.distributed.ProcessGroup``, a class that builds of PyTorch without torch.distributed lack."""


KEPT = 4
"""The number of memories that are kept from step to step."""


class Comm:
    """Two or more ranks that take steps together.

    Args:
        group: their process group, of which this process is a member.

    Attributes:
        rank: the number of this rank in the group.
        size: the number of ranks, R.
        steps: the number of steps that this rank has begun with the others.
        plans, params, methods: what the ranks know of their next steps; see ``gradkern.step.begin``.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = ref(group)
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.steps = 0
        self.plans: dict[Any, Any] = {}
        self.params: dict[int, Any] = {}
        self.methods: WeakSet[Any] = WeakSet()
        self._kept: dict[Any, Any] = {}
        pairs = dist.get_backend_config(group).split(",")
        self._backends: dict[str, str] = dict(pair.split(":", 1) for pair in pairs)
        self._host: tuple[ProcessGroup | None, torch.device] | None = None

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        group = self._group()
        assert group is not None, "whoever found the ranks by their group holds it"
        return group

    @property
    def ranks(self) -> list[int]:
        """The numbers of the ranks in the default group."""
        return dist.get_process_group_ranks(self.group)

    def keep(self, key: Any, memory: Any) -> None:
        """Keep memory for a later step."""
        self._kept[key] = memory
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]

    def taken(self, key: Any) -> Any:
        """Return the memory that is kept under a key, and keep it no more; None if there is none."""
        return self._kept.pop(key, None)

    def _for_hosts(self) -> tuple[ProcessGroup, torch.device]:
        """Return a group of the same ranks for messages of the hosts, and the device of its tensors.

        It is the CPU, so that the hosts wait for no other device, unless there is no group for it: only the default
        group gets one made, because all processes must take part in that.
        """
        if self._host is None:  # a group of its own is held; the other one must end with whoever holds it
            cpu = torch.device("cpu")
            if self._backend(cpu):
                self._host = None, cpu
            elif self.group is dist.group.WORLD:
                self._host = dist.new_group(backend="gloo"), cpu
            else:
                self._host = None, torch.device(next(iter(self._backends)))
        made, device = self._host
        return (self.group if made is None else made), device

    def _backend(self, device: torch.device) -> str | None:
        """Return the backend for tensors on a device; None if there is none."""
        return self._backends.get(device.type)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the integers of each rank, as many from each. The hosts wait for each other."""
        group, device = self._for_hosts()
        return self._gathered(torch.tensor(numbers, dtype=torch.int64, device=device), group).tolist()

    def exchange_flags(self, flags: Sequence[bool]) -> list[list[bool]]:
        """Return the flags of each rank, as many from each. The hosts wait for each other."""
        group, device = self._for_hosts()
        return self._gathered(torch.tensor(flags, dtype=torch.uint8, device=device), group).bool().tolist()

    def exchange_texts(self, text: str) -> list[str]:
        """Return the text of each rank. The hosts wait for each other."""
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, text, group=self._for_hosts()[0])
        return texts

    def from_first(self, x: Tensor) -> Tensor:
        """Return the tensor of rank 0, on the CPU and of the same shape on all ranks."""
        group, device = self._for_hosts()
        received = x.to(device, copy=True)
        dist.broadcast(received, dist.get_global_rank(group, 0), group=group)
        return received.cpu()

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, in float64. They are added in the order of ranks on every rank."""
        parts = self._gathered(x.double().contiguous(), self.group).unbind()
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def united(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, where at most one rank has a number other than zero: it is exact."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean_of_shard(self, shard: Tensor, x: Tensor, room: Tensor) -> Any:
        """Start computing the mean of the ranks' vectors, of which ``shard`` gets this rank's part.

        Gloo has a reduce-scatter only by name: it reduces whole vectors on every rank, which moves twice the words, and
        the caller waits for it. So there each rank sends the others their parts, and averages what it receives.

        Args:
            shard: (n,), the part.
            x: (R n,), this rank's vector.
            room: what :meth:`room` returns for ``x``.

        Returns:
            What to wait for. ``x`` and ``room`` must not change before.
        """
        if self._backend(x.device) != "gloo":
            return _reduce_scatter(shard, x, op=dist.ReduceOp.AVG, group=self.group, async_op=True)
        return _Mean(_all_to_all(room, x, group=self.group, async_op=True), room.view(self.size, -1), shard)

    def room(self, x: Tensor) -> Tensor:
        """Return memory for what :meth:`mean_of_shard` receives."""
        return torch.empty_like(x) if self._backend(x.device) == "gloo" else x.new_empty(0)

    def all_gather(self, x: Tensor, shard: Tensor) -> Any:
        """Start putting the ranks' shards together into ``x``; return what to wait for."""
        return _all_gather(x, shard, group=self.group, async_op=True)

    def _gathered(self, x: Tensor, group: ProcessGroup) -> Tensor:
        """Return the tensors of all ranks, with a dimension of ranks in front."""
        parts = x.new_empty((self.size, *x.shape))
        _all_gather(parts.view(-1), x.view(-1), group=group)
        return parts


class _Mean:
    """The mean of the vectors that a rank is about to receive.

    Args:
        work: what to wait for.
        received: the ranks' vectors, (R, n).
        shard: (n,), gets the mean. It is rounded to its dtype once, however the ranks' numbers are rounded.
    """

    def __init__(self, work: Any, received: Tensor, shard: Tensor) -> None:
        self._work = work
        self._received = received
        self._shard = shard

    def wait(self) -> None:
        """Wait for the vectors, and write their mean."""
        self._work.wait()
        torch.mean(self._received, 0, out=self._shard)


def _named(*names: str) -> Any:
    """Return a function of torch.distributed by its first name that there is; builds without it have none."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_all_gather = _named("all_gather_single", "all_gather_into_tensor")  # PyTorch 2.13 has renamed them
_all_to_all = _named("all_to_all_single")
_reduce_scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
_comms: "WeakKeyDictionary[ProcessGroup, Comm]" = WeakKeyDictionary()


def comm_of(process_group: ProcessGroup | bool | None) -> Comm | None:
    """Return the ranks of a step; None if it is this rank alone.

    Args:
        process_group: a process group; None for the default one, if torch.distributed is initialized; False for this
            rank alone.

    Raises:
        TypeError: ``process_group`` is none of these.
        ValueError: this rank is not in the group.
    """
    if process_group is False or not dist.is_available():
        return None
    if process_group is None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this rank is in, None or False; got "
            f"{shown(process_group)}"
        )
    known = _comms.get(process_group)
    if known is None:
        if dist.get_rank(process_group) < 0:
            raise ValueError(f"process_group must be one that this rank is in, got {shown(process_group)}")
        known = _comms[process_group] = Comm(process_group)
    return known if known.size > 1 else None
