"""Candidates timed in rounds, and the decision.

Machines drift, so every round runs all candidates in turn, the default setting twice, and a copy of the same rows. The
two times of the default setting show the noise: whatever makes them differ is not the setting's doing. Another
candidate wins only if it is faster by more than that.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from gradkern.tuning import clock

FEWEST, MOST = 5, 25
"""Rounds: few, if calls take long; more than ``MOST`` would tell nothing new."""
MOST_CALLS = 100
"""Calls of a round: more launches than some hundreds would not wait in a GPU's queue."""
LEAST = 0.01
"""The least noise. A setting that gains less does not take the default's place."""


class Contestant(NamedTuple):
    """A run under a setting."""

    setting: AbstractContextManager[object]
    run: Callable[[], object]


def rounds_of(contestants: Sequence[Contestant], seconds: float, device: torch.device) -> list[list[float]]:
    """Return the seconds per call of each contestant in each round.

    Args:
        contestants: what runs in turn.
        seconds: the time for all rounds, of which there are some even if it is short.
        device: the device whose clock counts.
    """
    once = []
    for setting, run in contestants:
        with setting:
            run()  # compiles, and makes inputs
            once.append(max(clock.timed(run, 1, device, ahead=True), 1e-7))
    rounds = min(MOST, max(FEWEST, int(seconds / 2 / sum(once))))
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for (setting, run), estimate, of_contestant in zip(contestants, once, times, strict=True):
            calls = min(MOST_CALLS, max(1, int(seconds / rounds / len(contestants) / estimate / 2)))
            with setting:
                run()  # looks up the setting
                of_contestant.append(clock.timed(run, calls, device, ahead=True))
    return times


def noise(first: Sequence[float], again: Sequence[float]) -> float:
    """Return the part by which two times of one run differ at most in four of five rounds, ``LEAST`` or more."""
    apart = sorted(abs(a - b) / min(a, b) for a, b in zip(first, again, strict=True))
    return max(LEAST, apart[-(-4 * len(apart) // 5) - 1])


def ratio(of: Sequence[float], first: Sequence[float], again: Sequence[float]) -> float:
    """Return the median over the rounds of a time over that of the default setting, the mean of its two."""
    return statistics.median([2 * t / (a + b) for t, a, b in zip(of, first, again, strict=True)])


def is_faster(of: Sequence[float], first: Sequence[float], again: Sequence[float]) -> bool:
    """Return whether times are lower than the two of the default setting by more than the noise."""
    return ratio(of, first, again) < 1 - noise(first, again)


class Won(NamedTuple):
    """The result of a contest: which candidate has won, and the noise.

    There are the median seconds of the winner, of the first candidate and of the copy.
    """

    winner: int
    noise: float
    seconds: float
    first: float
    copy: float


def contest(
    candidates: Sequence[AbstractContextManager[object]],
    run: Callable[[], object],
    copy: Callable[[], object],
    seconds: float,
    device: torch.device,
) -> Won:
    """Time a run under each candidate; the first one is the default setting, and wins unless another is faster."""
    contestants = [Contestant(candidate, run) for candidate in candidates]
    *times, again, of_copy = rounds_of([*contestants, contestants[0], Contestant(nullcontext(), copy)], seconds, device)
    winner = min(range(len(times)), key=lambda k: ratio(times[k], times[0], again))
    if winner and not is_faster(times[winner], times[0], again):
        winner = 0
    return Won(winner, noise(times[0], again), *(statistics.median(t) for t in (times[winner], times[0], of_copy)))
