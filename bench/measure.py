"""Timing that withstands a machine whose speed drifts: contestants run in turn, and ratios are taken per round."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from bench.device import timed
from bench.memory import peak

ROUNDS = 15
FEWEST = 3
SLOW, SLOWER = 3.0, 5.0
"""Seconds, and multiples of our time. A contestant slower than both runs in the first round only, because more rounds
are not worth the time. Ours and contestants of similar speed run at least three rounds on any machine. Both times of a
ratio are always measured in the same round, after a warm-up call that does not count."""


@dataclass
class Measurements:
    """Measured times, memory and failures of the contestants, by name.

    Attributes:
        seconds: seconds per call, one figure per round.
        processor: seconds of this process's threads per call, likewise; those that wait actively count.
        peaks: peak memory in bytes, by ``memory.peak``.
        failed: reasons why contestants could not be measured.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    contestants: Mapping[str, Callable[[], object]],
    ours: str,
    seconds: float,
    device: torch.device,
    progress: Callable[[str], object] = lambda text: None,
) -> Measurements:
    """Measure the contestants in rounds that run each of them in turn, each for an equal share of the time.

    Args:
        contestants: calls to measure, by name; one that is also a context manager is entered before it is timed.
        ours: name of our contestant; its errors are raised, those of the others are recorded.
        seconds: approximate time for all contestants; three rounds are always run, and very slow calls add to it.
        device: device whose clock and memory count.
        progress: called with a line that says what comes next.
    """
    found = Measurements()
    once: dict[str, float] = {}
    for name, run in contestants.items():
        progress(f"first calls of {name}")
        try:
            once[name], found.peaks[name] = _first(run, device)
        except Exception as error:  # an error in another library must not end a long run
            if name == ours:
                raise
            found.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    found.seconds, found.processor = {name: [] for name in once}, {name: [] for name in once}
    slow = {name for name, t in once.items() if t > max(SLOW, SLOWER * once[ours])}
    quick = {name: max(t, 1e-7) for name, t in once.items() if name not in slow}
    rounds = min(ROUNDS, max(FEWEST, int(seconds / sum(quick.values()))))
    for k in range(rounds):
        progress(f"round {k + 1} of {rounds}")
        for name in once if k == 0 else quick:
            calls = 1 if name in slow else max(1, int(seconds / rounds / len(quick) / quick[name]))
            with context(contestants[name]):
                before = time.process_time()
                found.seconds[name].append(timed(contestants[name], calls, device))
                found.processor[name].append((time.process_time() - before) / calls)
    return found


def _first(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Return the time and the peak memory of a call, after a first call that sets everything up.

    A slow call is not repeated without the memory count, whose cost does not matter there.
    """
    with context(run):
        run()
        took: list[float] = []
        most = peak(lambda: took.append(timed(run, 1, device)), device)
        return (took[0] if took[0] > SLOW else timed(run, 1, device)), most


def context(run: Callable[[], object]) -> AbstractContextManager[object]:
    """Return the context in which ``run`` is timed. Entering it is not part of the time."""
    return run if isinstance(run, AbstractContextManager) else nullcontext()


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else 9 * values
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Return quantiles of ``of`` / ``to`` over the rounds that both ran: above 1, ``to`` is faster."""
    return quantiles([a / b for a, b in zip(of, to, strict=False)])
