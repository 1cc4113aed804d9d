"""Checkpoints, and interrupts that wait for the end of a step."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically."""
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Return the state that :func:`save` wrote, on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def rng_state() -> dict[str, Any]:
    """Return the states of torch's default generators, from which dropout draws."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the states that :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def interruptible() -> Iterator[SimpleNamespace]:
    """Delay the first Ctrl-C within the block; a second one interrupts at once.

    The yielded object's ``requested`` becomes True at the first Ctrl-C, and the block must then end the run. An
    interrupt within an optimizer's step would leave some parameters stepped and others not, so that the run could not
    be resumed.
    """
    interrupt = SimpleNamespace(requested=False)

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now\n")  # print may itself be interrupted

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
