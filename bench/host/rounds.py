"""Rounds of calls, timed one by one."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Given = TypeVar("Given")

WARM_UP, FEWEST = 10, 3
"""The number of first rounds that do not count, and the least number of rounds that do."""


def rounds(seconds: float) -> Iterator[bool]:
    """Yield for each round whether it counts, until the time is over."""
    for _ in range(WARM_UP):
        yield False
    end, n = time.perf_counter() + seconds, 0
    while n < FEWEST or time.perf_counter() < end:
        yield True
        n += 1


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    contestants: Mapping[str, Callable[[Given], object]], prepare: Callable[[], Given], seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of each contestant's calls, one call a round, in an order that rotates by one every round.

    ``measure.measure`` times many calls in a row. Here a call uses up what it is given, which is made outside the time.

    Args:
        contestants: the calls by name.
        prepare: makes what a call is given.
        seconds: approximate time for all contestants, with what is made for them.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for counts in rounds(seconds):
        for name in names:
            given = prepare()
            start = time.perf_counter()
            contestants[name](given)
            end = time.perf_counter()
            if counts:
                found[name].append(end - start)
        names = [*names[1:], names[0]]
    return found
