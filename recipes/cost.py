"""The cost of a training step: with the plain sum of the losses, with PCGrad as usually written, and with gradkern.

All three run the same losses and take the same steps of the optimizer. They are timed in turn, round by round, because
the speed of a machine drifts. A ratio is between two times of one round, and the median is over the rounds.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

import gradkern as gk

ROUNDS = 15
SECONDS = 0.2  # time of one contestant in one round, or one step if that is longer

Losses = Sequence[Callable[[], Tensor]]
Backward = Callable[[gk.SurgeryOptimizer, Losses], gk.SurgeryInfo | None]
"""Fills ``.grad`` from the losses, as ``gk.SurgeryOptimizer.backward`` does."""


def plain_sum(opt: gk.SurgeryOptimizer, losses: Losses) -> None:
    """Fill ``.grad`` with the gradient of the sum of the losses."""
    sum(loss() for loss in losses).backward()


def usual_pcgrad(opt: gk.SurgeryOptimizer, losses: Losses) -> None:
    """Fill ``.grad`` by PCGrad's usual loop: it flattens each task's gradient, projects it, and splits the sum again.

    Parameters that one loss alone reaches are in the vectors too, as zeros of the other tasks.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    vectors = []
    for loss in losses:
        grads = torch.autograd.grad(loss(), params, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        vectors.append(torch.cat([piece.flatten() for piece in pieces]))
    update = torch.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        modified = vector.clone()
        for j in torch.randperm(len(vectors)).tolist():
            if j != i and (dot := modified @ vectors[j]) < 0:
                modified -= dot / (vectors[j] @ vectors[j]) * vectors[j]
        update += modified
    for p, piece in zip(params, update.split([p.numel() for p in params]), strict=True):
        p.grad = piece.view_as(p)


WAYS: dict[str, Backward] = {"sum": plain_sum, "usual": usual_pcgrad, "gradkern": gk.SurgeryOptimizer.backward}


def measure(step_with: Callable[[Backward], Callable[[], object]]) -> dict[str, list[float]]:
    """Return the seconds per step of each way, one figure for each round.

    Args:
        step_with: returns a training step, with a model of its own, whose ``.grad`` the given function fills.
    """
    steps = {name: step_with(backward) for name, backward in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step in steps.values():
            step()  # the first step creates the optimizer's state
        for _ in range(ROUNDS):
            for name, step in steps.items():
                seconds[name].append(_seconds_per_step(step))
    finally:
        torch.set_num_threads(threads)
    return seconds


def report(seconds: dict[str, list[float]]) -> str:
    """Return one line with the medians: the time with the plain sum, and the ratios of the other two to it."""

    def ratio(name: str, to: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    return (
        f"a step with the plain sum takes {1e3 * median(seconds['sum']):.2f} ms; "
        f"with PCGrad as usually written {ratio('usual', 'sum'):.2f} times as long, "
        f"with gradkern {ratio('gradkern', 'sum'):.2f} times; usual / gradkern {ratio('usual', 'gradkern'):.2f} "
        f"(medians of {ROUNDS} rounds, one thread)"
    )


def _seconds_per_step(step: Callable[[], object]) -> float:
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < SECONDS:
        step()
        n += 1
    return (time.perf_counter() - start) / n
