"""Timing that can be trusted on a machine that drifts: contestants in turn, round after round, ratios per round."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from bench.device import timed
from bench.memory import peak

ROUNDS = 15
FEWEST = 3
SLOW, SLOWER = 3.0, 5.0
"""Seconds, and calls of ours, beyond both of which a contestant takes part in the first round alone: a median of more
is not worth it. Ours and who comes near it have three rounds or more, however slow the machine; and whatever stands in
a ratio was measured side by side, after first calls that do not count."""


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
        contestants: by name, what to call; one that is a context manager too is entered before it is timed.
        ours: the one whose errors are ours, and raised.
        seconds: about how long to measure, all together; at least three rounds, and very slow calls come on top.
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
    found.seconds = {name: [] for name in once}
    slow = {name for name, t in once.items() if t > max(SLOW, SLOWER * once[ours])}
    quick = {name: max(t, 1e-7) for name, t in once.items() if name not in slow}
    rounds = min(ROUNDS, max(FEWEST, int(seconds / sum(quick.values()))))
    for k in range(rounds):
        tell(f"round {k + 1} of {rounds}")
        for name in once if k == 0 else quick:
            calls = 1 if name in slow else max(1, int(seconds / rounds / len(quick) / quick[name]))
            with _ready(contestants[name]):
                found.seconds[name].append(timed(contestants[name], calls, device))
    return found


def _first(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """About how long a call takes, and its peak memory: when it has run once, and what is made once is there.

    What the counting of memory adds is nothing beside a long call, which for that is not made again.
    """
    with _ready(run):
        run()
        took: list[float] = []
        most = peak(lambda: took.append(timed(run, 1, device)), device)
        return (took[0] if took[0] > SLOW else timed(run, 1, device)), most


def _ready(run: Callable[[], object]) -> AbstractContextManager[object]:
    """What is to hold while ``run`` is timed, and takes no part in its time."""
    return run if isinstance(run, AbstractContextManager) else nullcontext()


def quantiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else 9 * values
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Quantiles of ``of`` / ``to``, round by round, as long as both took part: above 1, ``to`` is the faster."""
    return quantiles([a / b for a, b in zip(of, to, strict=False)])
