"""Unitary scalarization: fixed weights, so one backward pass of Σ w_i L_i and no surgery (Kurin et al. 2022)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkern.aggregators.base import PerDevice, check_gramian
from gradkern.aggregators.weightings.scalarization import Scalarization, Tasks
from gradkern.arguments import numbers
from gradkern.ops.undo import PutBack, nothing


class FixedWeights(Scalarization):
    """A scalarization whose weights are numbers of the host, the same in every step."""

    has_fixed_weights = True

    def __init__(self, report: bool = False) -> None:
        super().__init__(report)
        self._tensors: dict[int, PerDevice] = {}
        self._known_kinds: dict[Any, np.ndarray[Any, Any]] = {}  # the weights for kinds of M that are checked

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

    def weights(self, M: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the fixed weights, for every Gramian in the batch; see :meth:`Aggregator.weights`."""
        kind = (M.shape, M.dtype, M.layout) if type(M) is Tensor and M.is_cpu and not M.is_nested else None
        known = self._known_kinds.get(kind)
        if known is not None:  # a sixth of the time of checks and a new tensor of numbers
            return torch.from_numpy(known.copy())
        check_gramian(M)
        if kind is not None and M.ndim == 2:
            dtype = np.float64 if M.dtype is torch.float64 else np.float32
            self._known_kinds[kind] = np.array(self.task_weights(M.shape[-1]), dtype)
        return self.weights_like(M.shape[-1], M.dtype, M.device).expand(M.shape[:-1]).clone()

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the fixed weights, absent tasks' too."""
        return self.weights_like(tasks.count, torch.float64, tasks.device)

    def multipliers(self, weights: Tensor) -> Sequence[float | Tensor]:
        """Return the weights as numbers of the host, which a backward pass takes as they are."""
        return self.task_weights(len(weights))

    def snapshot(self) -> PutBack:
        """Put nothing back: there is no state."""
        return nothing


class Constant(FixedWeights):
    """The weighted sum of the task gradients, Σ w_i g_i.

    Args:
        weights: T finite numbers, one per task.
        report: as for :class:`Scalarization`.
    """

    def __init__(self, weights: Sequence[float] | Tensor, report: bool = False) -> None:
        super().__init__(report)
        self._weights = numbers("weights", weights)

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return the given weights."""
        if len(self._weights) != n_tasks:
            raise ValueError(f"weights has {len(self._weights)} entries for {n_tasks} tasks: {self._weights}")
        return self._weights

    def __repr__(self) -> str:
        return self._repr_of(f"weights={self._weights}")


class Sum(FixedWeights):
    """The sum of the task gradients, or their weighted sum.

    Args:
        weights: T finite numbers, or None for ones.
        report: as for :class:`Scalarization`.
    """

    def __init__(self, weights: Sequence[float] | Tensor | None = None, report: bool = False) -> None:
        super().__init__(report)
        self._given = None if weights is None else Constant(weights)

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return the given weights, or ones."""
        return [1.0] * n_tasks if self._given is None else self._given.task_weights(n_tasks)

    def __repr__(self) -> str:
        return self._repr_of(f"weights={None if self._given is None else self._given._weights}")


class Mean(FixedWeights):
    """The mean of the task gradients over all T tasks, where absent ones count as zeros.

    Args:
        report: as for :class:`Scalarization`.
    """

    def task_weights(self, n_tasks: int) -> list[float]:
        """Return 1/T for each task."""
        return [1.0 / n_tasks] * n_tasks

    def __repr__(self) -> str:
        return self._repr_of()
