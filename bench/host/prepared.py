"""A step on prepared gradients, without autograd: three tasks and PCGrad, into ``.grad``, then AdamW along it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import gradkern as gk
from bench.shapes import BERT_BASE, Shape
from gradkern.gradients.losses import Pass
from gradkern.step.options import Options
from gradkern.step.pipeline import run
from gradkern.step.sinks import GradSink

T = 3
SIDE, CUT = 48, 64


def shapes(n: int) -> list[Shape]:
    """Return the shapes of n small tensors, whose time is the host's.

    They are matrices and vectors in turn. For as many as BERT-base has, they are BERT-base's, cut in each dimension.
    """
    if n == len(BERT_BASE):
        return [tuple(min(size, CUT) for size in shape) for shape in BERT_BASE]
    return [(SIDE, SIDE) if k % 2 == 0 else (SIDE,) for k in range(n)]


class Gradients:
    """A source of gradients that are there already.

    Args:
        rows: T rows of n gradients.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        self.present = [True] * len(rows)
        self.values: list[Tensor | None] = [torch.zeros(()) for _ in rows]
        self.frozen_grads: dict[int, dict[Tensor, Tensor]] = {}
        self.loss_scale = None
        self._originals = rows
        self._rows: list[list[Tensor | None]] = []

    def renew(self) -> None:
        """Make new gradients, which a step may overwrite, as those of a backward pass are."""
        self._rows.clear()  # before there are new ones, so that these can take the memory
        self._rows += [[g.clone() for g in row] for row in self._originals]

    def open(self, device: torch.device) -> None:
        """Accept any device."""

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Yield each task's number and gradients."""
        yield from enumerate(self._rows)


class Prepared:
    """A model's parameters, their prepared gradients, and what a training step does with them.

    Args:
        shapes: the shapes of the parameters.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.source = Gradients([[torch.randn(shape) for shape in shapes] for _ in range(T)])
        self.adamw = gk.optim.AdamW(self.params)
        self._aggregator = gk.PCGrad()

    def renew(self) -> None:
        """Prepare a step: there are new gradients, and no ``.grad``."""
        for p in self.params:
            p.grad = None
        self.source.renew()

    def step(self) -> None:
        """Take the step that ``gradkern.backward`` takes."""
        run(self.source, GradSink(), Options(self._aggregator), self.params)
