"""What an interrupted run leaves behind, and how it is interrupted: between two steps, never within one."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, all of it or nothing."""
    written = path.with_suffix(".new")
    torch.save(state, written)
    os.replace(written, path)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def random() -> dict[str, Any]:
    """Where torch's own random number generators are, which dropout draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random(state: Mapping[str, Any]) -> None:
    """Put them where :func:`random` said."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def interruptible() -> Iterator[SimpleNamespace]:
    """Within the block the first Ctrl-C is only noted, in ``came``, and answered; a second one interrupts at once.

    An optimizer that is interrupted has stepped some parameters and not others, which nobody could go on from.
    """
    noted = SimpleNamespace(came=False)

    def note(number: int, frame: FrameType | None) -> None:
        if noted.came:
            raise KeyboardInterrupt
        noted.came = True
        os.write(2, b"\nending soon; once more to end now\n")  # print may be what was interrupted

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
