"""What surrounds the inner optimizer, by name: one line each."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import gradkern as gk
from gradkern.demo.methods import Recipe

PLAIN = Recipe(lambda generator: gk.Sum())
"""Where nothing is shared: in a phase of one task, or of heads alone."""

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
        task_weights: of the losses in their sum; None for ones. Of "unitary" alone: surgery weighs the tasks itself.
        suppression: the probability to drop an entry of a shared parameter's gradient; None for none.
        sampling: of ``TaskSampler``. Where a step trains one task, it is modified against the others' last gradients.

    Raises:
        ValueError: ``task_weights`` for another method.
    """
    recipe = METHODS[name]
    if task_weights is not None:
        if name != "unitary":
            raise ValueError(f"task_weights are of the method 'unitary', not of {name!r}; got {tuple(task_weights)}")
        recipe = replace(recipe, aggregator=lambda generator: gk.Sum(task_weights))
    masks = None if suppression is None else partial(gk.Suppression, suppression)
    return replace(recipe, suppression=masks, memory=sampling != "joint")
