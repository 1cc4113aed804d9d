"""Timing that can be trusted on a machine that drifts: contestants in turn, round after round, ratios per round."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.device import timed
from bench.memory import peak

ROUNDS = 15
FEWEST = 3
SLOW = 3.0
"""Seconds of a call beyond which one call, after the first, is all that is taken: a median of more is not worth it."""


@dataclass
class Measured:
    """What came of the contestants, by name.

    Attributes:
        seconds: per call, one figure per round.
        peaks: bytes, as ``memory.peak`` tells.
        failed: why a contestant could not be measured.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measured(
    contestants: Mapping[str, Callable[[], object]],
    ours: str,
    seconds: float,
    device: torch.device,
    tell: Callable[[str], object] = lambda text: None,
) -> Measured:
    """Every round runs all contestants, one after another, each as often as an equal share of the time allows.

    Args:
        contestants: by name, what to call.
        ours: the one whose errors are ours, and raised.
        seconds: about how long to measure, all together; at least three rounds.
        device: whose clock and memory count.
        tell: is told what comes next.
    """
    found = Measured()
    once: dict[str, float] = {}
    for name, run in contestants.items():
        tell(f"first calls of {name}")
        try:
            once[name], found.peaks[name] = _first(run, device)
        except Exception as error:  # a long run does not end for what another library cannot do
            if name == ours:
                raise
            found.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    found.seconds = {name: [t] if t > SLOW else [] for name, t in once.items()}
    quick = {name: max(t, 1e-7) for name, t in once.items() if t <= SLOW}
    rounds = min(ROUNDS, max(FEWEST, int(seconds / sum(quick.values())))) if quick else 0
    for k in range(rounds):
        tell(f"round {k + 1} of {rounds}")
        for name, t in quick.items():
            calls = max(1, int(seconds / rounds / len(quick) / t))
            found.seconds[name].append(timed(contestants[name], calls, device))
    return found


def _first(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """About how long a call takes, and its peak memory: when it has run once, and what is made once is there.

    What the counting of memory adds is nothing beside a long call, which for that is not made again.
    """
    run()
    took: list[float] = []
    most = peak(lambda: took.append(timed(run, 1, device)), device)
    return (took[0] if took[0] > SLOW else timed(run, 1, device)), most


def quantiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else 9 * values
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Quantiles of ``of`` / ``to``, round by round, as long as both took part: above 1, ``to`` is the faster."""
    return quantiles([a / b for a, b in zip(of, to, strict=False)])
