"""One run: the whole step in turn, its parts in rounds of their own, and as a CUDA graph where there are such."""

from collections.abc import Callable
from typing import Any

import torch

from bench.measure import Measured, measured, quantiles, ratio
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
    tell: Callable[[str], object],
) -> None:
    """Measure all contestants on one model.

    Args:
        size: the encoder's.
        device: where.
        peers: beside whom.
        seconds: about how long the whole step is measured; its parts and its graph take about as long each.
        results: to which what was measured is added.
        tell: is told what comes next.
    """
    with device:
        model = MultiTask(size.config)
    steps = contestants(model, peers)
    whole = measured(steps, BASELINE, seconds, device, lambda text: tell(f"whole step: {text}"))
    split = _split({name: steps[name] for name in whole.seconds}, whole, device, tell)
    graphs = Measured()
    if device.type == "cuda":
        captured = {name: Captured(steps[name]) for name in whole.seconds}
        graphs = measured(captured, BASELINE, seconds, device, lambda text: tell(f"as a CUDA graph: {text}"))
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
    steps: dict[str, Step], whole: Measured, device: torch.device, tell: Callable[[str], object]
) -> dict[str, list[dict[str, float]]]:
    """The parts of as many steps of each contestant as it had rounds, in turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    rounds = max(map(len, whole.seconds.values()))
    for k in range(rounds):
        tell(f"parts: round {k + 1} of {rounds}")
        for name, step in steps.items():
            if k < len(whole.seconds[name]):
                found[name].append(parts(step, device))
    return found


def _timed(found: Measured, name: str) -> dict[str, Any]:
    """Seconds, and how many times as long as the baseline."""
    seconds = found.seconds[name]
    return {"seconds": quantiles(seconds), "rounds": len(seconds), "ratio": ratio(seconds, found.seconds[BASELINE])}
