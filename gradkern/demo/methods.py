"""The methods that the demo compares: every row of METHODS with one batch, and options beside or around a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import gradkern as gk
from gradkern.aggregators import methods
from gradkern.aggregators.method import Method


@dataclass(frozen=True)
class Recipe:
    """Arguments of a ``SurgeryOptimizer`` around any inner optimizer.

    Attributes:
        aggregator: makes an aggregator, whose random numbers come from the given ``generator``.
        groups: the groups of parameters that have a Gramian of their own.
        suppression: makes a suppression, whose masks follow from the given ``seed``.
        conflict_lr: a ``ConflictLR``; it has no state, so one object serves every optimizer.
        memory: True to train the tasks in turn, one update for each, against the last gradients of the others.
    """

    aggregator: Callable[..., gk.Aggregator]
    groups: str = "model"
    suppression: Callable[..., gk.Suppression] | None = None
    conflict_lr: gk.ConflictLR | None = None
    memory: bool = False

    def around(
        self,
        inner: torch.optim.Optimizer,
        seed: int,
        device: torch.device,
        shared: Sequence[torch.Tensor] | None = None,
    ) -> gk.SurgeryOptimizer:
        """Wrap ``inner`` in this method. Its random decisions follow from ``seed``; parameters are on ``device``."""
        return gk.SurgeryOptimizer(
            inner,
            self.aggregator(generator=torch.Generator(device).manual_seed(seed)),
            groups=self.groups,
            shared=shared,
            suppression=None if self.suppression is None else self.suppression(seed=seed),
            conflict_lr=self.conflict_lr,
            memory=self.memory,
        )


def recipe(method: Method) -> Recipe:
    """Return the recipe of a row of METHODS, with no other options."""
    return Recipe(lambda generator: method.seeded(generator.initial_seed(), generator.device))


METHODS: dict[str, Recipe] = {
    **{name: recipe(method) for name, method in methods.ONE_BATCH.items()},
    "pcgrad-memory": Recipe(gk.PCGrad, memory=True),
    "gradvac-module": Recipe(gk.GradVac, groups="module"),
    "lr-attenuate": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("attenuate")),
    "lr-amplify": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("amplify")),
    "suppression-0.30": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.30)),
    "suppression-0.45": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.45)),
    "suppression-0.60": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.60)),
    "suppression-block": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.60, block=128, scope="all")),
}
"""The recipes by their names on the command line, in the order of the table."""

BASELINE = "sum"
"""The method that step times are relative to."""


def family(method: str) -> str:
    """Return the part of a name before its first dash."""
    return method.partition("-")[0]
