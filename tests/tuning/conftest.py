"""A user's cache directory of its own for each test, small inputs, few keys, and a clock that a test decides."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gradkern.ops.pytorch.chunks import cut, even_width
from gradkern.ops.tables import places, reading
from gradkern.ops.tables.candidates import keys
from gradkern.ops.tables.card import Card, card_of
from gradkern.ops.tables.places import default_place
from gradkern.tuning import clock, command, inputs, subjects


def read_anew() -> None:
    reading.forget()
    cut.cache_clear()
    even_width.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let tables be read, from a folder that is empty, and none after the test."""
    monkeypatch.setattr(places, "_cache", lambda: tmp_path / "cache")
    monkeypatch.delenv(places.VARIABLE)
    read_anew()
    yield tmp_path / "cache"
    monkeypatch.undo()
    read_anew()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "BYTES", dict.fromkeys(inputs.BYTES, 1 << 16))
    monkeypatch.setattr(subjects, "BLOCKS", 20_003)
    monkeypatch.setattr(command, "keys", lambda kind: [k for k in keys(kind) if (k.rows, k.itemsize) == (3, 4)])


@pytest.fixture
def card() -> Card:
    """Give the card of this machine's CPU."""
    found = card_of(torch.device("cpu"))
    assert found is not None
    return found


@pytest.fixture
def place(card: Card) -> Path:
    """Give the file that is read for the CPU by default."""
    return default_place(card)


Clock = Callable[[Callable[[], float]], None]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give a function that replaces the clock by one that tells a run's time, asked within the run's setting."""

    def stop(seconds: Callable[[], float]) -> None:
        def timed(run: Callable[[], object], calls: int, device: torch.device, ahead: bool) -> float:
            run()
            return seconds()

        monkeypatch.setattr(clock, "timed", timed)

    return stop
