"""The methods and the optimizers that a run can use, by name."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

import gradkern as gk
from gradkern.demo.methods import Recipe

SUM = Recipe(lambda generator: gk.Sum())
"""The sum of the losses. It replaces every method if nothing is shared: when one task or only heads are trained."""

METHODS: dict[str, Recipe] = {
    "single-task": SUM,
    "unitary": SUM,
    "pcgrad": Recipe(gk.PCGrad),
    "pcgrad-random": Recipe(partial(gk.PCGrad, "random")),
    "pcgrad-average": Recipe(partial(gk.PCGrad, "average")),
    "pcgrad-most-similar": Recipe(partial(gk.PCGrad, "most_similar")),
    "pcgrad-most-different": Recipe(partial(gk.PCGrad, "most_different")),
    "gradvac": Recipe(gk.GradVac, groups="parameter"),
    "attention": Recipe(gk.GradAttention),
    "conflict-lr-attenuate": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("attenuate")),
    "conflict-lr-amplify": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("amplify")),
}
"""Methods by their name on the command line. "single-task" trains a model for each task. GradVac works on each
parameter separately, as in its report."""

OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "gradkern": gk.optim.AdamW}
"""AdamW with a fused step: torch's, and gradkern's, whose step also combines the task gradients."""


def make_recipe(name: str, task_weights: Sequence[float] | None, suppression: float | None, sampling: str) -> Recipe:
    """Return the method with that name, with the given weights, suppression and sampling.

    Args:
        name: key of ``METHODS``.
        task_weights: weights of the losses in the sum of "unitary"; None for ones.
        suppression: probability to drop an entry of a shared parameter's gradient; None for no suppression.
        sampling: scheme of ``TaskSampler``. If a step trains one task, its gradient is modified against the other
            tasks' last gradients.
    """
    recipe = METHODS[name]
    if task_weights is not None:
        recipe = replace(recipe, aggregator=lambda generator: gk.Sum(task_weights))
    masks = None if suppression is None else partial(gk.Suppression, suppression)
    return replace(recipe, suppression=masks, memory=sampling != "joint")
