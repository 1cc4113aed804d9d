"""Random numbers of a method that are the same on all ranks: those that rank 0 draws."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from gradkern.distributed.comm import Comm


def same_draws(comm: Comm | None, method: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Let the method draw on every rank what it draws on rank 0, within the block.

    The other ranks take over the state of rank 0's generators. They get the state of their default generator back
    afterwards, because other random numbers, such as dropout's, must differ from rank to rank. A generator of the
    method's own draws for the method alone, so it stays like that of rank 0.

    Args:
        comm: the ranks; None for this rank alone.
        method: the method.
        device: the device whose default generator the method draws from if it has no generator of its own.
    """
    return _ALONE if comm is None else _same_draws(comm, method, device)


_ALONE = nullcontext()


@contextmanager
def _same_draws(comm: Comm, method: nn.Module, device: torch.device) -> Iterator[None]:
    own, has_default = _own_generators(method)
    default = _default_generator(device) if has_default else None
    generators = own if default is None else [*own, default]
    before = None if default is None else default.get_state()
    states = [generator.get_state() for generator in generators]
    sizes = [state.numel() for state in states]
    if sizes:
        received = comm.from_first(torch.cat(states)).split(sizes)
        if comm.rank > 0:
            for generator, state in zip(generators, received, strict=True):
                generator.set_state(state.clone())
    try:
        yield
    finally:
        if default is not None and before is not None and comm.rank > 0:
            default.set_state(before)


def _own_generators(method: nn.Module) -> tuple[list[torch.Generator], bool]:
    """Return the generators of the method and of those within it, and whether one of these has none of its own."""
    found = [getattr(module, "generator", None) for module in method.modules()]
    return [g for g in found if isinstance(g, torch.Generator)], None in found


def _default_generator(device: torch.device) -> torch.Generator | None:
    """Return the default generator of a device; None if the device has none that can be read."""
    if device.type == "cpu":
        return torch.default_generator
    generators = getattr(getattr(torch, device.type, None), "default_generators", ())
    index = device.index or 0
    return generators[index] if index < len(generators) else None
