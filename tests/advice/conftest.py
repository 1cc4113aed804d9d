"""Advice in tests is quick: a call is timed once."""

import pytest

from gradkern.advice import seconds


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "ROUNDS", (1, 1))
