"""Where the tensors that are alive have their memory: a kernel may access no other.

All tensors of the process count, because tables of addresses point at some that are no arguments of the launch.
"""

import gc
import weakref
from collections.abc import Iterable

import torch

MANY = 50_000
"""When there are more objects than this, those that are there are set aside, and not gone through again."""

_set_aside: list["weakref.ref[torch.Tensor]"] = []


def storages(arguments: Iterable[object]) -> list[tuple[int, int]]:
    """Return the first address of each storage and the one after its last, of the arguments and all other tensors."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    tensors += [tensor for reference in _set_aside if (tensor := reference()) is not None]
    tensors += _of_objects()
    found = set()
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return list(found)


def _of_objects() -> list[torch.Tensor]:
    """Return the tensors among the objects that Python's garbage collector knows, but for those set aside before."""
    objects = gc.get_objects()
    tensors = [thing for thing in objects if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    if len(objects) > MANY:
        del objects
        gc.collect()
        gc.freeze()
        _set_aside[:] = [reference for reference in _set_aside if reference() is not None]
        _set_aside.extend(map(weakref.ref, tensors))
    return tensors
