"""Unitary scalarization: fixed weights, so one backward pass of Σ w_i L_i and no surgery (Kurin et al. 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, PerDevice, check_gramian
from gradkern.arguments import numbers
from gradkern.ops import combine


class Scalarization(Aggregator):
    """A method whose weights do not depend on the gradients. On losses it is torch's backward pass of Σ w_i L_i."""

    needs_gramian = False

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, PerDevice] = {}

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return one weight per task.

        Raises:
            ValueError: the method was given weights for another number of tasks.
        """
        raise NotImplementedError

    def weights_like(self, n_tasks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return :meth:`task_weights` as a tensor, (T,)."""
        if n_tasks not in self._tensors:
            self._tensors[n_tasks] = PerDevice(self.task_weights(n_tasks))
        return self._tensors[n_tasks].on(device, dtype)

    def weights(self, M: Tensor) -> Tensor:
        """Return the fixed weights, for every Gramian in the batch; see :meth:`Aggregator.weights`."""
        check_gramian(M)
        return self.weights_like(M.shape[-1], M.dtype, M.device).expand(M.shape[:-1]).clone()

    def _aggregate(self, J: Tensor, offsets: Tensor | None, out: Tensor | None) -> Tensor:
        w = self.weights_like(J.shape[0], torch.float64, J.device)
        # It needs no Gramian.
        return combine(J, w if offsets is None else w.expand(offsets.shape[0] - 1, -1), offsets, out=out)


class Constant(Scalarization):
    """The weighted sum of the task gradients, Σ w_i g_i.

    Args:
        weights: T finite numbers, one per task.
    """

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        super().__init__()
        self._weights = numbers("weights", weights)

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return the given weights."""
        if len(self._weights) != n_tasks:
            raise ValueError(f"weights has {len(self._weights)} entries for {n_tasks} tasks: {self._weights}")
        return self._weights

    def __repr__(self) -> str:
        return f"Constant(weights={self._weights})"


class Sum(Scalarization):
    """The sum of the task gradients, or their weighted sum.

    Args:
        weights: T finite numbers, or None for ones.
    """

    def __init__(self, weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self._given = None if weights is None else Constant(weights)

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return the given weights, or ones."""
        return [1.0] * n_tasks if self._given is None else self._given.task_weights(n_tasks)

    def __repr__(self) -> str:
        return f"Sum(weights={None if self._given is None else self._given._weights})"


class Mean(Scalarization):
    """The mean of the task gradients over all T tasks, where absent ones count as zeros."""

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return 1/T for each task."""
        return [1.0 / n_tasks] * n_tasks

    def __repr__(self) -> str:
        return "Mean()"
