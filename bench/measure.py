"""Timing that can be trusted on a machine that drifts: contestants in turn, round after round, ratios per round."""

import statistics
import time
from collections.abc import Callable, Mapping

Times = dict[str, list[float]]


def interleaved(contestants: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 15) -> Times:
    """Seconds per call of each contestant, one figure per round; every round runs all of them, one after another.

    Args:
        contestants: by name, what to call.
        seconds: about how long to measure, all together.
        rounds: how many figures to take of each.
    """
    calls = {}
    for name, run in contestants.items():
        run()
        started = time.perf_counter()
        run()
        once = max(time.perf_counter() - started, 1e-7)
        calls[name] = max(1, int(seconds / rounds / len(contestants) / once))
    times: Times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                run()
            times[name].append((time.perf_counter() - started) / calls[name])
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Quantiles of ``of`` / ``to``, round by round: above 1, ``to`` is the faster."""
    return quantiles([a / b for a, b in zip(of, to, strict=True)])
