"""PCGrad: projecting conflicting gradients (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", Algorithm 1).

Task i starts from c = e_i and visits the other tasks j in a random order of its own. s = (c M)_j is the dot product
of its already modified gradient with the original g_j; if s < 0, c_j -= s / M_jj removes the conflict.

The variants (Rhapsody on a Theme of Gradient Surgery, §3.3) visit one partner only, or take the mean over partners. A
task whose gradient is zero is nobody's partner: its cosine, 0 by convention, would be larger than that of every
conflict, and hide it. An absent task without a remembered gradient is such a task.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Program, Solution
from gradkern.aggregators.projection import Order, Projection
from gradkern.arguments import choice, shown
from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.autograd import recording
from gradkern.ops.partners import ORDERED, PARTNERS

_pcgrad_matrix = operators.pcgrad_matrix.overload
_pcgrad_matrix_out = operators.pcgrad_matrix_out.overload


class PCGrad(Projection):
    """PCGrad of Yu et al. 2020. It runs on the device of the Gramian and never waits for the host.

    Args:
        partner: the tasks whose gradients a task's own gradient is projected onto where they conflict. "all": all other
            tasks, one after another, as in the paper. "random": one other task. "most_similar" or "most_different":
            the task with the largest or the smallest cosine, the first of equals. "average": all other tasks, and the
            result is the mean of the projections, each of the original gradient. A task whose gradient is zero is
            nobody's partner; so is one that is absent, unless memory has its last gradient.
        order: None for a fresh random order for each segment and task, as in the paper. Otherwise integers: (T,), the
            order in which every task visits its partners, or (T, T), where row i is the order of task i. Each row is
            a permutation of 0 … T-1, in which a task skips its own index. With ``partner="random"`` the first task
            of the order whose gradient is not zero is the partner; the other three kinds of partner use no order and
            take none.
        reduction: "sum" of the T modified gradients, as in the paper, or their "mean".
        generator: a generator on the Gramian's device that draws the random orders; None for the device's default one.
    """

    def __init__(
        self,
        partner: str = "all",
        order: Order | None = None,
        reduction: str = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        choice("partner", partner, PARTNERS)
        if order is not None and partner not in ORDERED:
            raise ValueError(f"order must be None with partner={partner!r}, which uses none; got {shown(order)}")
        super().__init__(order, reduction, generator)
        self.partner = partner

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        # One operator does all, unless the steps in between matter: to a subclass's weights, a derivative or segments.
        if type(self) is not PCGrad or offsets is not None or recording(J):
            return super()._aggregate(J, offsets, losses, out)
        keys, partner = self._arguments(1, J.shape[0], J.device)
        if out is None:
            return _pcgrad_matrix(J, keys, partner, self.reduction == "mean")
        _pcgrad_matrix_out(J, keys, partner, self.reduction == "mean", out)
        return out

    def program(self, M: Tensor) -> Program | None:
        """Return PCGrad's program; see :meth:`Aggregator.program`."""
        if type(self) is not PCGrad:  # a subclass may compute other weights
            return None
        keys, partner = self._arguments(M.shape[0], M.shape[1], M.device)
        projection = ProjectionArguments(keys, partner, None, None, 0.0, self.reduction == "mean")
        return Program(projection, lambda _, w: Solution(w))

    def _solve(self, M: Tensor, present: Tensor | None) -> Tensor:
        return operators.pcgrad(M, *self._arguments(M.shape[0], M.shape[1], M.device))

    def _arguments(self, S: int, T: int, device: torch.device) -> tuple[Tensor | None, str]:
        """Return order keys and partner, as the operators take them."""
        return self._order_keys(S, T, device) if self.partner in ORDERED else None, self.partner

    def __repr__(self) -> str:
        return f"PCGrad(partner={self.partner!r}, {self._repr_shared()})"
