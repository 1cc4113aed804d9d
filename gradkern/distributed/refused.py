"""Wrappers of other makes that do not go with a step on several ranks: each is refused by name, with what to do.

They leave no trace in a loss but their marks on parameters. Only the first step of some parameters looks for them.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

MARKS: dict[str, str] = {
    "_fsdp_flattened": "torch's FullyShardedDataParallel, the first FSDP, which reduces gradients within one backward "
    "pass: shard the model by torch.distributed.fsdp.fully_shard, or leave it whole in DistributedDataParallel",
    "ds_id": "DeepSpeed's ZeRO 3, which reduces gradients within one backward pass: shard the model by "
    "torch.distributed.fsdp.fully_shard, without DeepSpeed",
    "_hp_mapping": "DeepSpeed's ZeRO, whose optimizer never sees the gradients of single tasks: leave the model whole "
    "in DistributedDataParallel, or shard it by torch.distributed.fsdp.fully_shard, without DeepSpeed",
}
"""The attributes that libraries put on the parameters they manage, and how an error tells of them."""


def refuse_marked(tensors: Iterable[Tensor], name: Callable[[int], str]) -> None:
    """Raise ValueError if a parameter has one of the ``MARKS``.

    Args:
        tensors: parameters.
        name: the name of parameter k for the error.
    """
    for k, p in enumerate(tensors):
        for mark, whose in MARKS.items():
            if hasattr(p, mark):
                raise ValueError(f"{name(k)} belongs to {whose}")


def refuse_join(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError if a DistributedDataParallel of some of the parameters is within ``Join``, or has been.

    Nothing tells that the block has ended. A rank without batches answers there for the collectives of
    DistributedDataParallel, not for those of a step.
    """
    params = set(tensors)
    for module in living(DistributedDataParallel):
        if module._join_config.enable and not params.isdisjoint(module.parameters()):
            raise ValueError(
                "losses are computed within torch.distributed.algorithms.Join, whose ranks without batches do not "
                "take steps: give all ranks as many batches, as DistributedSampler does, or losses that are multiplied "
                "by 0 for a batch that a rank lacks"
            )


def living(kind: type) -> list[Any]:
    """Return the objects of a class that there are; of hundreds of thousands only the types are looked at."""
    objects = gc.get_objects()
    kinds = {found for found in set(map(type, objects)) if kind in found.__mro__}
    return [x for x in objects if type(x) in kinds] if kinds else []
