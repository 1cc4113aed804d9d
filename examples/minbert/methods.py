"""What surrounds the inner optimizer, by name: one line each."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import gradkern as gk
from gradkern.demo.methods import Recipe

PLAIN = Recipe(lambda generator: gk.Sum())
"""The sum of the losses, and all that is left of any method where nothing is shared: one task alone, or heads alone."""

METHODS: dict[str, Recipe] = {
    "single-task": PLAIN,
    "unitary": PLAIN,
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
"""By name on the command line. "single-task" trains a model for each task; GradVac's groups are the parameters, as its
report's."""


def chosen(name: str, task_weights: Sequence[float] | None, suppression: float | None, sampling: str) -> Recipe:
    """The method of that name, for a training that weights, suppresses and samples so.

    Args:
        name: in ``METHODS``.
        task_weights: of the losses in the sum of "unitary"; None for ones.
        suppression: the probability to drop an entry of a shared parameter's gradient; None for none.
        sampling: of ``TaskSampler``. Where a step trains one task, it is modified against the others' last gradients.
    """
    recipe = METHODS[name]
    if task_weights is not None:
        recipe = replace(recipe, aggregator=lambda generator: gk.Sum(task_weights))
    masks = None if suppression is None else partial(gk.Suppression, suppression)
    return replace(recipe, suppression=masks, memory=sampling != "joint")
