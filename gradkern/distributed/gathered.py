"""The weights that ``fully_shard`` gathers, which are the leaves of its graphs in place of the parameters."""

import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from gradkern.distributed.refused import living
from gradkern.gradients.sharded import is_dtensor

_owners: dict[int, Any] = {}
"""Weak references to what ``fully_shard`` knows of each parameter, by the parameter's identity."""


def leaves_of(params: Sequence[Tensor], device: torch.device, name: Callable[[int], str]) -> list[Tensor]:
    """Return for each parameter the leaf that graphs have of it: itself, or the weight that is gathered of a DTensor.

    torch tells of these in no public way. Its objects for them are looked for in a first step, and checked in each.

    Args:
        params: the parameters.
        device: the device that the leaves must be on.
        name: the name of parameter k for the error.

    Raises:
        NotImplementedError: a DTensor has no such leaf.
    """
    if any(is_dtensor(p) and _owner(p) is None for p in params):
        fsdp: Any = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
        _owners.clear()
        for owner in () if fsdp is None else living(fsdp.FSDPParam):
            _owners[id(owner.sharded_param)] = ref(owner)
    leaves = []
    for k, p in enumerate(params):
        leaf = getattr(_owner(p), "_unsharded_param", None) if is_dtensor(p) else p
        if leaf is None or is_dtensor(leaf) or leaf.device != device:
            raise NotImplementedError(
                f"through='activations' is for DTensors that fully_shard has made from tensors on {device}, and "
                f"{name(k)} in params is another one: give through='rows'"
            )
        leaves.append(leaf)
    return leaves


def _owner(p: Tensor) -> Any:
    found = _owners.get(id(p))
    owner = None if found is None else found()
    return owner if owner is not None and owner.sharded_param is p else None
