"""Steps through activations over graphs drawn at random, compared with whole rows."""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.step.activations.truth import FINISHES, check_step

D = 4
NEAR = 1e-11
"""The numbers that pass through a graph differ in size by up to three orders."""

pytestmark = [
    pytest.mark.usefixtures("float64_by_default", "way"),
    pytest.mark.filterwarnings("ignore:there is no surgery"),  # of some draws
]


class Params(NamedTuple):
    """Parameters that a graph uses as often as it happens to."""

    matrices: list[Tensor]
    biases: list[Tensor]
    table: Tensor
    scale: Tensor
    filters: Tensor

    @property
    def all(self) -> list[Tensor]:
        return [*self.matrices, *self.biases, self.table, self.scale, self.filters]


class Draw:
    """What a graph is drawn from: parameters, and the tensors (N, D) that it has so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.n = self.random.choice([1, 2, 5])
        self.params = Params(
            [nn.Parameter(torch.randn(D, D) / 2) for _ in range(self.random.randint(1, 4))],
            [nn.Parameter(torch.randn(D)) for _ in range(2)],
            nn.Parameter(torch.randn(6, D)),
            nn.Parameter(torch.randn(())),
            nn.Parameter(torch.randn(D, D, 2) / 3),
        )
        for p in self.params.all[1:]:
            p.requires_grad_(self.random.random() > 0.08)
        self.tensors = [torch.randn(self.n, D), self.look_up()]

    def tensor(self) -> Tensor:
        """Return one of the tensors, most often of the latest."""
        return self.random.choice(self.tensors[-4:] if self.random.random() < 0.7 else self.tensors)

    def matrix(self) -> Tensor:
        return self.random.choice(self.params.matrices)

    def bias(self) -> Tensor:
        return self.random.choice(self.params.biases)

    def look_up(self) -> Tensor:
        return F.embedding(torch.randint(6, (self.n,)), self.params.table, padding_idx=self.random.choice([None, 1]))

    def convolved(self, h: Tensor) -> Tensor:
        padding = self.random.choice([0, 1])
        return F.conv1d(h.unsqueeze(-1).expand(self.n, D, 3), self.params.filters, padding=padding)[..., 0]


OPERATIONS: list[Callable[[Draw, Tensor], Tensor]] = [
    lambda draw, h: h @ draw.matrix(),
    lambda draw, h: h @ draw.matrix().t(),
    lambda draw, h: F.linear(h, draw.matrix(), draw.bias()),
    lambda draw, h: F.linear(h, draw.matrix()),
    lambda draw, h: h @ (draw.matrix() @ draw.matrix()),
    lambda draw, h: h @ draw.matrix().clone(),
    lambda draw, h: h + 0.1 * draw.matrix().square().sum(),
    lambda draw, h: h + draw.tensor(),
    lambda draw, h: h.clone().add_(draw.tensor()),
    lambda draw, h: h * torch.tanh(draw.tensor()),
    lambda draw, h: torch.tanh(h),
    lambda draw, h: torch.cat([h, draw.tensor()], -1).chunk(2, -1)[draw.random.randint(0, 1)],
    lambda draw, h: torch.stack([h, draw.tensor()]).unbind()[draw.random.randint(0, 1)],
    lambda draw, h: h + draw.look_up(),
    lambda draw, h: h + draw.bias(),
    lambda draw, h: h * draw.params.scale,
    lambda draw, h: draw.convolved(h),
    lambda draw, h: h.detach(),
]


def losses_of(draw: Draw) -> list[Tensor | None]:
    """Return two to four losses, some of which are absent, or computed from another."""
    losses: list[Tensor | None] = []
    for t in range(draw.random.randint(2, 4)):
        kind = draw.random.random()
        loss = (draw.tensor() - t).square().mean()
        if kind < 0.3:
            loss = loss + 0.1 * draw.tensor().sum()
        elif kind < 0.4 and losses and losses[-1] is not None:
            loss = 2 * losses[-1] + loss
        elif kind < 0.45:
            loss = draw.tensor()[0, 0]
        if not loss.requires_grad:  # each loss has to reach a parameter
            loss = loss + draw.params.matrices[0].sum()
        losses.append(None if kind > 0.9 and t else loss)
    return losses


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("seed", range(60))
def test_a_step_is_that_of_whole_rows(seed: int, finish: str) -> None:
    draw = Draw(seed)
    for _ in range(draw.random.randint(3, 14)):
        h = draw.random.choice(OPERATIONS)(draw, draw.tensor())
        draw.tensors.append(torch.tanh(h) if h.abs().max() > 100 else h)
    check_step(losses_of(draw), draw.params.all, finish, NEAR)
