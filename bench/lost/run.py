"""One run: each model trains with PCGrad by rows, and the ways are measured at some of its steps."""

from itertools import islice
from typing import Any

import torch

import gradkern as gk
from bench.lost.problems import Problem
from bench.lost.shares import measured, ways

METHODS = ("pcgrad", "mgda", "upgrad")
"""Methods whose updates are measured."""


def train(name: str, problem: Problem, seed: int, steps: int, results: dict[str, Any]) -> None:
    """Train a model, and at some steps, the first among them, add a row for each method to the results.

    Args:
        name: the problem's name.
        problem: the model, untrained.
        seed: seed of the sketches, and of PCGrad's orders in training.
        steps: the number of steps.
        results: results whose "rows" are extended.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = torch.optim.AdamW(problem.model.parameters(), lr=problem.lr)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(generator=generator))
    to_measure, P = ways(seed), sum(p.numel() for p in problem.trunk.parameters())
    for step, given in enumerate(islice(problem.passes, steps)):
        if step % problem.every == 0:
            at = {"problem": name, "P": P, "seed": seed, "step": step, "losses": [loss.item() for loss in given.losses]}
            for method in METHODS:
                found = measured(problem, given, method, step, to_measure)
                results["rows"].append(at | {"method": method} | found._asdict())
        opt.backward(given.losses)
        opt.step()
        opt.zero_grad()
