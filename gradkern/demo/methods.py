"""The methods that the demo compares: one line each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import gradkern as gk


@dataclass(frozen=True)
class Recipe:
    """What a method is, as ``SurgeryOptimizer`` takes it.

    Attributes:
        aggregator: makes one, which draws its random numbers from the ``generator`` it is given.
        groups: what has a Gramian of its own.
        suppression: makes one, whose masks follow from the ``seed`` it is given.
        conflict_lr: has no state, so it serves every optimizer.
        memory: the tasks train in turn, an update for each, against the last gradients of the others.
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
        """``inner`` with this method, all its random decisions from ``seed``; the parameters are on ``device``."""
        return gk.SurgeryOptimizer(
            inner,
            self.aggregator(generator=torch.Generator(device).manual_seed(seed)),
            groups=self.groups,
            shared=shared,
            suppression=None if self.suppression is None else self.suppression(seed=seed),
            conflict_lr=self.conflict_lr,
            memory=self.memory,
        )


METHODS: dict[str, Recipe] = {
    "sum": Recipe(lambda generator: gk.Sum()),
    "pcgrad": Recipe(gk.PCGrad),
    "pcgrad-random": Recipe(partial(gk.PCGrad, "random")),
    "pcgrad-average": Recipe(partial(gk.PCGrad, "average")),
    "pcgrad-similar": Recipe(partial(gk.PCGrad, "most_similar")),
    "pcgrad-different": Recipe(partial(gk.PCGrad, "most_different")),
    "pcgrad-memory": Recipe(gk.PCGrad, memory=True),
    "gradvac": Recipe(partial(gk.GradVac, 0.01)),
    "gradvac-module": Recipe(partial(gk.GradVac, 0.01), groups="module"),
    "lr-attenuate": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("attenuate")),
    "lr-amplify": Recipe(gk.PCGrad, conflict_lr=gk.ConflictLR("amplify")),
    "suppression-0.30": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.30)),
    "suppression-0.45": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.45)),
    "suppression-0.60": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.60)),
    "suppression-block": Recipe(gk.PCGrad, suppression=partial(gk.Suppression, 0.60, block=128, scope="all")),
    "gradattention": Recipe(gk.GradAttention),
}
"""By name on the command line, and in the order of the table."""

BASELINE = "sum"
"""The method that step times are relative to."""


def family(method: str) -> str:
    """What comes before a dash in its name."""
    return method.partition("-")[0]
