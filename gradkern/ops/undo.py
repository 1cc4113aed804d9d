"""Undoing what a block has changed before it raised."""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from gradkern.ops.capture import capturing

PutBack = Callable[[], None]
"""A function that puts a state back as it was when the function was made."""


class Undo:
    """Puts states back if its block raises, whatever it raises: a keyboard interrupt too.

    Args:
        states: a function for each state.
    """

    def __init__(self, *states: PutBack) -> None:
        self._states = states

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for put_back in self._states:
                put_back()


def nothing() -> None:
    """Put nothing back."""


def numbers_of(x: Tensor) -> PutBack:
    """Keep a copy of a tensor's numbers, to write them into its memory again.

    Nothing is kept during the capture of a CUDA graph, which changes no numbers.
    """
    if capturing(x.device):
        return nothing
    before = x.detach().clone()

    def put_back() -> None:
        x.detach().copy_(before)

    return put_back


def state_of(generator: torch.Generator) -> PutBack:
    """Keep a generator's state."""
    if capturing(generator.device):
        return nothing
    before = generator.get_state()

    def put_back() -> None:
        generator.set_state(before)

    return put_back
