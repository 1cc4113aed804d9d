"""RGW, random gradient weighting (Lin et al. 2022, "Reasonable Effectiveness of Random Weighting").

The weights are the softmax of T numbers drawn from the normal distribution, new ones in each step. The paper proposes
it as a litmus test: a method should do better.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, check_gramian, in_dtype
from gradkern.ops import combine


class RGW(Aggregator):
    """Random gradient weighting of Lin et al. 2022: the softmax of normal draws, new ones in each step and group.

    The weights are greater than 0, sum to 1, and do not depend on the gradients. Absent tasks have none.

    Args:
        generator: a generator on the Gramian's device that draws the numbers; None for the device's default one.
    """

    needs_present = True
    uses_memory = False

    def weights(self, M: Tensor) -> Tensor:
        """Return new weights for every Gramian; see :meth:`Aggregator.weights`."""
        check_gramian(M)
        return in_dtype(self._drawn(M.shape[:-1], M.device).softmax(-1), M)

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return new weights of the present tasks, which sum to 1; see :meth:`Aggregator.solution`."""
        if present is None:
            return Solution(self.weights(M))
        check_gramian(M)
        numbers = self._drawn(M.shape[:-1], M.device).where(present, -torch.inf)
        return Solution(in_dtype(numbers.softmax(-1), M))

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        groups = () if offsets is None else (len(offsets) - 1,)
        return combine(J, self._drawn((*groups, len(J)), J.device).softmax(-1), offsets, out=out)

    def _drawn(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return normal draws of a shape, float64."""
        if self.generator is not None and self.generator.device != device:
            raise ValueError(f"generator is on {self.generator.device}, M on {device}")
        # PyTorch reads numbers faster than a tuple of them.
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return "RGW()" if self.generator is None else f"RGW(generator={self.generator!r})"
