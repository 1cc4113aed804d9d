"""One run: the whole step in turn, its parts in separate rounds, and on a GPU the step as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

from bench.measure import Measurements, measure, quantiles, ratio
from bench.peers import Peers
from bench.step.captured import Captured
from bench.step.contestants import BASELINE, Step, contestants
from bench.step.model import MultiTask, Size
from bench.step.parts import PARTS, parts


def run(
    size: Size,
    device: torch.device,
    peers: Peers,
    seconds: float,
    results: dict[str, Any],
    progress: Callable[[str], object],
) -> None:
    """Measure all contestants on one model.

    Args:
        size: size of the encoder.
        device: device to measure on.
        peers: peers to compare with.
        seconds: approximate time to measure the whole step; its parts and its graph take about as long each.
        results: results that are extended.
        progress: called with a line that says what comes next.
    """
    with device:
        model = MultiTask(size.config)
    steps = contestants(model, peers)
    whole = measure(steps, BASELINE, seconds, device, lambda text: progress(f"whole step: {text}"))
    split = _split({name: steps[name] for name in whole.seconds}, whole, device, progress)
    graphs = Measurements()
    if device.type == "cuda":
        captured = {name: Captured(steps[name]) for name in whole.seconds}
        graphs = measure(captured, BASELINE, seconds, device, lambda text: progress(f"as a CUDA graph: {text}"))
    P = sum(p.numel() for p in model.parameters())
    results |= {"size": size.name, "P": P}
    for name in whole.seconds:
        over = whole.peaks[name] - whole.peaks[BASELINE]
        row = {"contestant": name} | _timed(whole, name)
        row["parts"] = {part: quantiles([found[part] for found in split[name]]) for part in PARTS}
        row |= {"peak": whole.peaks[name], "over": over, "over in rows": over / (4 * P)}
        if name in graphs.seconds:
            row["captured"] = _timed(graphs, name)
        results["rows"].append(row)
    for kind, why in (("whole step", peers.missing | whole.failed), ("CUDA graph", graphs.failed)):
        results["skipped"] += [{"contestant": name, "what": kind, "why": w} for name, w in why.items()]


def _split(
    steps: dict[str, Step], whole: Measurements, device: torch.device, progress: Callable[[str], object]
) -> dict[str, list[dict[str, float]]]:
    """Measure the parts of each contestant's step in turn, once for each round it had."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    rounds = max(map(len, whole.seconds.values()))
    for k in range(rounds):
        progress(f"parts: round {k + 1} of {rounds}")
        for name, step in steps.items():
            if k < len(whole.seconds[name]):
                found[name].append(parts(step, device))
    return found


def _timed(found: Measurements, name: str) -> dict[str, Any]:
    """Return the seconds, and the ratio to the baseline's."""
    seconds = found.seconds[name]
    return {"seconds": quantiles(seconds), "rounds": len(seconds), "ratio": ratio(seconds, found.seconds[BASELINE])}
