"""The times of calls: how often they run, in which order, and what is left behind."""

import gc
from collections.abc import Callable

import pytest
import torch

from gradkern.advice import seconds
from gradkern.advice.seconds import medians

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Let each call take the next of some given seconds; calls are timed 3 to 25 times."""
    monkeypatch.setattr(seconds, "ROUNDS", (3, 25))

    def takes(durations: list[float]) -> None:
        now = [0.0]
        for duration in durations:
            now += [now[-1] + duration] * 2
        readings = iter(now)
        monkeypatch.setattr(seconds, "perf_counter", lambda: next(readings))

    return takes


def test_medians_of_calls_that_take_turns(clock: Callable[[list[float]], None]) -> None:
    order: list[str] = []
    clock([5.0, 1.0, 2.0, 6.0, 9.0, 3.0])
    found = medians([lambda: order.append("a"), lambda: order.append("b")], CPU)
    assert order == list("abba" + "ab")
    assert found == [6.0, 2.0]  # of 5, 6, 9 and of 1, 2, 3


def test_short_calls_are_timed_more_often(clock: Callable[[list[float]], None]) -> None:
    for duration, expected in ((1e-6, 25), (0.1, 10), (0.4, 3)):
        calls: list[int] = []
        clock([duration] * expected)
        medians([lambda calls=calls: calls.append(1)], CPU)
        assert len(calls) == expected


def test_garbage_is_collected_again_after_a_call_that_raises() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        medians([lambda: 1 / 0], CPU)
    assert gc.isenabled()
    gc.disable()
    try:
        medians([lambda: None], CPU)
        assert not gc.isenabled()
    finally:
        gc.enable()
