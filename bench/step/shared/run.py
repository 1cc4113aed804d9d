"""One run: all ways to take the step of each model with each number of tasks."""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.measure import measure, quantiles, ratio
from bench.peers import TORCHJD, Peers
from bench.step.shared.models import MODELS, Shared
from bench.step.shared.ways import PLAIN, ROWS, Way, ways

TOO_LONG = {("encoder", 40)}
"""Models and numbers of tasks whose ways would take minutes."""
DRAWS = 3
"""The updates of a way that is not exact, whose error is their median: each has other signs."""


def run(
    models: Sequence[str],
    tasks: Sequence[int],
    device: torch.device,
    peers: Peers,
    seconds: float,
    results: dict[str, Any],
    progress: Callable[[str], object],
) -> None:
    """Measure all ways.

    Args:
        models: names of ``MODELS``.
        tasks: numbers of tasks.
        device: device to measure on.
        peers: peers to compare with.
        seconds: approximate time for each model with each number of tasks.
        results: results that are extended.
        progress: called with a line that says what comes next.
    """
    if TORCHJD in peers.missing:
        results["skipped"].append({"way": TORCHJD, "why": peers.missing[TORCHJD]})
    for name, T in product(models, tasks):
        of = {"model": name, "T": T}
        if (name, T) in TOO_LONG:
            results["skipped"].append(of | {"way": "all", "why": "they would take minutes"})
            continue
        torch.manual_seed(0)
        with device:
            model = MODELS[name].make(T)
        taken = ways(model, peers)
        tell = partial(_tell, progress, f"{name}, T = {T}")
        found = measure(taken, PLAIN, seconds, device, tell)
        results["skipped"] += [of | {"way": way, "why": why} for way, why in found.failed.items()]
        tell("errors")
        errors = _errors(model, {way: taken[way] for way in found.seconds})
        P = sum(p.numel() for p in model.parameters())
        for way in found.seconds:
            row = of | {"P": P, "way": way, "rounds": len(found.seconds[way])}
            for clock, times in (("seconds", found.seconds), ("processor", found.processor)):
                row[clock] = quantiles(times[way])
                row[f"{clock} over {PLAIN}"] = ratio(times[way], times[PLAIN])
            row |= {"peak": found.peaks[way], "peak in P": found.peaks[way] / (4 * P)}
            results["rows"].append(row | errors[way])


def _tell(progress: Callable[[str], object], step: str, text: str) -> None:
    progress(f"{step}: {text}")


def _errors(model: Shared, taken: dict[str, Way]) -> dict[str, dict[str, Any]]:
    """Return by how much each way's update of the trunk differs from that of rows in float64.

    "error" is relative to the update, "lost" to what surgery changes in it: 0 if all of the surgery is there, 1 if the
    update is as far from it as without surgery.
    """
    double = ways(copy.deepcopy(model).double(), Peers())
    right, without = (_update(double[name]) for name in (ROWS, PLAIN))
    found = {}
    for name, way in taken.items():
        off = statistics.median(float((_update(way) - right).norm()) for _ in range(1 if way.exact else DRAWS))
        error, lost = off / float(right.norm()), off / float((right - without).norm())
        found[name] = {"exact": way.exact, "error": error, "lost": lost}
    return found


def _update(way: Way) -> Tensor:
    """Return the trunk's gradient that a way writes, as one float64 vector."""
    way.backward()
    gradient = torch.cat([p.grad.flatten().double() for p in way.model.trunk.parameters() if p.grad is not None])
    way.model.zero_grad()
    return gradient
