"""The stages of a step: microseconds and Python calls of each, by watching the functions that they consist of."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from bench.host.prepared import Prepared
from bench.host.rounds import rounds, timed
from bench.measure import quantiles
from bench.watch import watching
from gradkern.gradients.parameters import Targets
from gradkern.step import pipeline
from gradkern.step.sinks import GradSink

WATCHED = (
    ("read parameters", Targets, "of"),
    ("gather rows", pipeline, "gathered"),
    ("surgery", pipeline, "surgery"),
    ("combine", GradSink, "prepare"),
    ("write .grad", GradSink, "commit"),
    ("write .grad", GradSink, "finish"),
    ("info", pipeline, "_info"),
)
REST = "rest"
STAGES = (*dict.fromkeys(stage for stage, _, _ in WATCHED), REST)
STEP, ADAMW = "whole step", "AdamW.step"
COUNTED = 10
"""The number of steps whose calls are counted."""


def measured(prepared: Prepared, seconds: float) -> dict[str, Any]:
    """Return a row of raw results: the seconds and the Python calls of each stage, of the step, and of AdamW.

    The whole step and AdamW are timed while nothing is watched, so the stages add up to some microseconds more.

    Args:
        prepared: the step.
        seconds: approximate time, half of it for the stages.
    """
    whole: dict[str, list[float]] = {STEP: [], ADAMW: []}
    for counts in rounds(seconds / 2):
        prepared.renew()
        times = timed(prepared.step), timed(prepared.adamw.step)
        if counts:
            for found, t in zip(whole.values(), times, strict=True):
                found.append(t)
    split = _split(prepared, seconds / 2)
    calls, of_adamw = _calls(prepared)
    return {
        "tensors": len(prepared.params),
        "numbers": sum(p.numel() for p in prepared.params),
        "rounds": len(whole[STEP]),
        "seconds": {name: quantiles(of) for name, of in (whole | split).items()},
        "calls": calls | {STEP: sum(calls.values()), ADAMW: of_adamw},
    }


def _split(prepared: Prepared, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each stage, one figure for each round."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with watching(WATCHED, torch.device("cpu")) as spans:
        for counts in rounds(seconds):
            prepared.renew()
            spans.clear()
            spent = dict.fromkeys(STAGES, 0.0) | {REST: timed(prepared.step)}
            for stage, start, end in spans:
                spent[stage] += end - start
                spent[REST] -= end - start
            if counts:
                for stage, t in spent.items():
                    found[stage].append(t)
    return found


def _calls(prepared: Prepared) -> tuple[dict[str, int], int]:
    """Return the Python calls of the step by stage, and those of AdamW, the least of some steps.

    Tables are found again by addresses, and a step whose gradients lie elsewhere makes a few calls more.
    """
    of_step, of_adamw = [], []
    for _ in range(COUNTED):
        prepared.renew()
        of_step.append(calls_by_stage(prepared.step))
        of_adamw.append(sum(calls_by_stage(prepared.adamw.step).values()))
    return min(of_step, key=lambda calls: sum(calls.values())), min(of_adamw)


def calls_by_stage(call: Callable[[], object]) -> dict[str, int]:
    """Return the number of Python functions that one call runs, itself included, by stage.

    Before Python 3.12 a comprehension is a function.
    """
    stages = {getattr(owner, name).__code__: stage for stage, owner, name in WATCHED}
    found = dict.fromkeys(STAGES, 0)
    stage, outermost = REST, None

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal stage, outermost
        if event == "call":
            if outermost is None and frame.f_code in stages:
                stage, outermost = stages[frame.f_code], frame
            found[stage] += 1
        elif event == "return" and frame is outermost:
            stage, outermost = REST, None

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
