"""The rows of a step on several ranks, of which each rank holds a part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement, Column
from gradkern.step.rows import Rows, eps_of


@dataclass(frozen=True, kw_only=True)
class RankRows(Rows):
    """The parts of T rows that this rank holds. ``params``, ``grads`` and ``arrangement`` are of these parts.

    Attributes:
        comm: the ranks.
        targets: the n parameters.
        whole: the columns of the n parameters, with the tasks that reach them on any rank.
    """

    comm: Comm
    targets: Targets
    whole: Arrangement

    @property
    def of_step(self) -> Sequence[Tensor]:
        """The n parameters of the step."""
        return self.targets.tensors

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.targets.device

    @property
    def eps(self) -> tuple[float, ...] | None:
        """The spacing of numbers at 1 for each group of whole rows, S numbers: some groups may have no part here."""
        return eps_of(self.whole)

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield nothing: no rank has whole gradients."""
        return iter(())
