"""A method on task gradients that are divided by their lengths, by their losses, or by both."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, check_gramian
from gradkern.aggregators.scales import checked_losses, divided, loss_divisors
from gradkern.aggregators.weightings.fixed import Constant, Mean, Sum
from gradkern.aggregators.wrappers.wrapper import Wrapper, nan_where
from gradkern.arguments import choice


class Normalized(Wrapper):
    """Another method, on task gradients of comparable size: each is divided by a number s_i of its own.

    The update is the method's own for the gradients g_i / s_i, so its weights are divided by s_i. By length, no task
    counts for more because its gradient is longer, and the update's length no longer depends on the gradients'. A
    gradient of zero stays zero, and has the weight 0.

    Args:
        aggregator: the method, any that looks at the Gramian alone; also ``Sum``, ``Mean`` and ``Constant``, whose
            update is then the weighted sum of the divided gradients. Unshared parameters get their gradients as they
            are.
        by: the s_i: "l2", the gradients' lengths in each group; "loss", the losses; "loss+", the products of both.
            Losses of gradients that are not zero must be above 0: another one raises ValueError on a CPU, and elsewhere
            gives weights that are not a number. A remembered gradient of an absent task, which has no loss, is not
            divided by one.
    """

    fixed_weights = (Sum, Mean, Constant)

    def __init__(self, aggregator: Aggregator, by: str = "l2") -> None:
        super().__init__(aggregator)
        self.by = choice("by", by, ("l2", "loss", "loss+"))

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # it depends on the instance
        """Whether gradients are divided by their losses, or the method within takes them."""
        return self.by != "l2" or super().needs_losses

    def solution(
        self,
        M: Tensor,
        present: Tensor | None,
        losses: Tensor | None = None,
        eps: Sequence[float] | None = None,
    ) -> Solution:
        """Return the solution of the method within on the divided gradients, as weights of the gradients themselves.

        Args:
            M: (S, T, T), as for :meth:`weights`.
            present: as for :meth:`Aggregator.solution`.
            losses: as for :meth:`weights`.
            eps: the spacing of numbers at 1 in the arithmetic of each group's rows; None if it is that of M's dtype.
        """
        check_gramian(M)
        G = M.detach().double()
        zero = G.diagonal(dim1=-2, dim2=-1) == 0
        s = self._divisors(G, zero, present, losses)
        if eps is None:  # the divided Gramian is float64, and its digits are not
            eps = (torch.finfo(M.dtype).eps,) * len(M)
        solution = self._inner(divided(G, s), present, losses, eps)
        w = solution.weights / s
        # A method may give a broken gradient a weight, which would vanish over a length of infinity.
        spoilt = ~s.isfinite() if present is None else ~s.isfinite() & present
        return replace(solution, weights=nan_where(spoilt, w.masked_fill(zero, 0.0)).to(M.dtype))

    def _divisors(self, M: Tensor, zero: Tensor, present: Tensor | None, losses: Tensor | None) -> Tensor:
        """Return the s_i (S, T), 1 for gradients of zero."""
        s = torch.ones_like(M[..., 0])
        if self.by != "loss":
            s = M.diagonal(dim1=-2, dim2=-1).sqrt().masked_fill(zero, 1.0)
        if self.by != "l2":
            s = s * loss_divisors(checked_losses(losses, M, f"by={self.by!r}", batched=True), M, present)
        return s

    def __repr__(self) -> str:
        return f"Normalized({self.aggregator!r}, by={self.by!r})"
