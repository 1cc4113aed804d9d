"""What surrounds the inner optimizer, by name: one line each."""

import math
from dataclasses import replace
from functools import partial

import gradkern as gk
from gradkern.demo.methods import Recipe

REPORT_WEIGHTS = (1.0, math.log(1 / 5) / math.log(1 / 2), -math.log(1 / 5))
"""Of "Unitary Scalarization or Gradient Surgery?"."""

PLAIN = Recipe(lambda generator: gk.Sum())
"""Where nothing is shared: in a phase of one task, or of heads alone."""

METHODS: dict[str, Recipe] = {
    "single-task": PLAIN,
    "unitary": PLAIN,
    "unitary-weighted": Recipe(lambda generator: gk.Sum(REPORT_WEIGHTS)),
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


def chosen(name: str, suppression: float | None, sampling: str) -> Recipe:
    """The method of that name, for a training that suppresses and samples so.

    Args:
        name: in ``METHODS``.
        suppression: the probability to drop an entry of a shared parameter's gradient; None for none.
        sampling: of ``TaskSampler``. Where a step trains one task, it is modified against the others' last gradients.
    """
    masks = None if suppression is None else partial(gk.Suppression, suppression)
    return replace(METHODS[name], suppression=masks, memory=sampling != "joint")
