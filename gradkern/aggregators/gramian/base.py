"""The base class of methods whose weights are a function of the Gramian and of which tasks are present."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, PerDevice, Solution, check_gramian, in_dtype
from gradkern.arguments import numbers, shown


class GramianMethod(Aggregator):
    """A method whose weights are a function of the Gramian. Absent tasks are left out of its problem."""

    needs_present = True
    uses_memory = False

    def __init__(self) -> None:
        super().__init__()

    def weights(self, M: Tensor) -> Tensor:
        """Return the weights of the task gradients in the update; see :meth:`Aggregator.weights`."""
        return self._weights(M, None, None)

    def solution(
        self, M: Tensor, present: Tensor | None, losses: Tensor | None = None, eps: Sequence[float] | None = None
    ) -> Solution:
        """Return the weights of the present tasks' problem; see :meth:`Aggregator.solution`.

        Args:
            M: (S, T, T), as for :meth:`weights`.
            present: as for :meth:`Aggregator.solution`.
            losses: not needed.
            eps: the spacing of numbers at 1 in the arithmetic of each group's rows, S numbers; None if it is that of
                M's dtype. Only methods with ``needs_eps`` are given it.
        """
        return Solution(self._weights(M, present, eps))

    def _weights(self, M: Tensor, present: Tensor | None, eps: Sequence[float] | None) -> Tensor:
        check_gramian(M)
        precision = torch.finfo(M.dtype).eps if eps is None else _epsilons(tuple(eps)).on(M.device, torch.float64)
        return in_dtype(self._solve(M, present, precision), M)

    @abstractmethod
    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        """Return the weights (..., T).

        Args:
            M: a Gramian, checked.
            present: as for :meth:`Aggregator.solution`.
            eps: the precision of M's entries: a number, or (S, 1) for M (S, T, T).
        """


class Preference(PerDevice):
    """A number for each task, as a tensor on any device.

    Args:
        preference: T finite numbers, not all 0.
        least: the smallest that makes sense.

    Raises:
        TypeError, ValueError: ``preference`` is not as described above.
    """

    def __init__(self, preference: Sequence[float] | Tensor, least: float = -math.inf) -> None:
        super().__init__(numbers("preference", preference, least))
        if not any(self.values):
            raise ValueError(f"preference must hold a number other than 0, got {shown(preference)}")

    def of(self, M: Tensor) -> Tensor:
        """Return the numbers for the tasks of M: (T,) float64."""
        if len(self.values) != M.shape[-1]:
            raise ValueError(f"preference has {len(self.values)} entries for {M.shape[-1]} tasks: {shown(self.values)}")
        return self.on(M.device, torch.float64)


@lru_cache(maxsize=64)
def _epsilons(eps: tuple[float, ...]) -> PerDevice:
    return PerDevice([[x] for x in eps])
