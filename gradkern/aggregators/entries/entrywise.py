"""The base class of methods that combine the task gradients entry by entry, and so have no weights."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, check_gramian
from gradkern.ops.arguments import Mask, TaskGrads
from gradkern.ops.autograd import recording
from gradkern.ops.offsets import column_bounds


class Entries(NamedTuple):
    """The entries that a method combines, and where the results go.

    Attributes:
        rows: the gradients of T tasks for n parameters.
        positions: the position of each parameter's first entry in the random stream, a multiple of 4.
        out: n tensors for the results, each of which may be one of the gradients of its parameter.
        present: (T,) bool, the tasks whose gradients belong to this step, if the others' are remembered; None if not.
        mask: the mask that drops entries of the results; None for none.
        kept: grows by the number of entries that the mask keeps; None without a mask.
    """

    rows: TaskGrads
    positions: Sequence[int]
    out: Sequence[Tensor]
    present: Tensor | None = None
    mask: Mask | None = None
    kept: Tensor | None = None


class Entrywise(Aggregator):
    """A method that combines the task gradients entry by entry: it has no weights, and needs no Gramian.

    Groups of parameters are combined alike, so ``groups`` changes nothing but the Gramians in
    :class:`gradkern.SurgeryInfo`, which a step has only with :class:`gradkern.ConflictLR`. The update of a matrix has
    no derivative, so a matrix that requires grad is refused.
    """

    needs_gramian = False
    needs_entries = True
    looks_at_positions = False
    """Whether an entry's result depends on its position, and not only on the gradients there."""

    @abstractmethod
    def check_tasks(self, n_tasks: int) -> None:
        """Raise ValueError unless the method's arguments fit the number of tasks."""

    @abstractmethod
    def combine_entries(self, entries: Entries) -> None:
        """Write the results; :meth:`check_tasks` has accepted the number of tasks."""

    def advance(self, like: Tensor) -> None:
        """Move on to the next step, of gradients as ``like``; a method without state does nothing."""

    def weights(self, M: Tensor) -> Tensor:
        """Raise TypeError: the method has no weights.

        Raises:
            TypeError: always.
        """
        check_gramian(M)
        raise TypeError(f"{self!r} has no weights: it combines gradients entry by entry. Give it a matrix, or losses")

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        if recording(J):
            raise ValueError(f"J must not require grad, because {self!r} has no derivative: pass J.detach()")
        if offsets is not None:
            column_bounds(offsets, J.shape[1])  # which checks them
        self.check_tasks(J.shape[0])
        result = J.new_empty(J.shape[1]) if out is None else out
        if J.shape[1]:
            self.combine_entries(Entries(TaskGrads(list(J), [0], 1), [0], [result]))
            if out is not None and not J.is_meta:
                torch.autograd.graph.increment_version(out)  # for backward passes that have saved it
        self.advance(J)
        return result
