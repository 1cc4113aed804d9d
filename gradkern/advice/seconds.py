"""The time of calls, compared with each other."""

import gc
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch

ROUNDS = 3, 25
"""The least and the greatest number of times that each call is timed."""
BUDGET = 1.0
"""The seconds that all calls may take together, where they need not be timed more often than the least number."""


def medians(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the median seconds of each call. Calls have run before, so that nothing is done for the first time.

    They take turns, each round beginning with another one, so that a machine that slows down slows all of them.
    """
    first = [_seconds(run, device) for run in runs]
    least, most = ROUNDS
    n = max(least, min(most, int(BUDGET / max(sum(first), 1e-9))))
    found: list[list[float]] = [[seconds] for seconds in first]
    for r in range(1, n):
        for k in range(len(runs)):
            at = (k + r) % len(runs)
            found[at].append(_seconds(runs[at], device))
    return [median(of_run) for of_run in found]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call by the clock on the wall, until the device has done all of its work."""
    collects = gc.isenabled()
    gc.disable()  # as timeit does
    try:
        _wait(device)
        start = perf_counter()
        run()
        _wait(device)
        return perf_counter() - start
    finally:
        if collects:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
