"""Scalarization: a method that weighs the losses themselves, so that one backward pass of Σ w_i L_i is its update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, OwnGrads, Solution, check_gramian
from gradkern.aggregators.scales import checked_losses
from gradkern.arguments import boolean
from gradkern.ops import combine


@dataclass(frozen=True)
class Tasks:
    """The tasks of a step, as a weighting sees them.

    Attributes:
        count: T.
        device: the device of the weights.
        present: (T,) bool, true for the tasks that have a loss; None if all have one.
        losses: (T,) float64, detached, NaN for absent tasks; None if they are not known, or not needed.
        squares: (T,) float64, the squared lengths of the task gradients; None if they are not known.
    """

    count: int
    device: torch.device
    present: Tensor | None = None
    losses: Tensor | None = None
    squares: Tensor | None = None

    def known(self) -> Tensor:
        """Return the losses.

        Raises:
            ValueError: they are missing.
        """
        if self.losses is None:
            raise ValueError("losses must be given, T numbers, since this method depends on them; got None")
        return self.losses

    def among_present(self, values: Tensor, absent: float | Tensor) -> Tensor:
        """Return ``values`` with other numbers for absent tasks."""
        return values if self.present is None else torch.where(self.present, values, absent)

    def softmax(self, scores: Tensor) -> Tensor:
        """Return the softmax of scores over the present tasks; 0 for absent ones."""
        return torch.softmax(self.among_present(scores, -torch.inf), -1)

    def n_present(self) -> Tensor | int:
        """Return the number of present tasks."""
        return self.count if self.present is None else self.present.sum()

    def finite(self) -> Tensor:
        """Return a bool on the device: whether the losses of all present tasks are finite."""
        return self.among_present(self.known(), 0.0).isfinite().all()


class Scalarization(Aggregator):
    """A method that weighs losses. On losses it is torch's own backward pass of Σ w_i L_i.

    The weights may depend on the losses, on random draws, on the method's own state and on the lengths of the task
    gradients, but no gradient flows through them.

    Args:
        report: whether steps compute the Gramian of the task gradients, for the norms, cosines and conflicts of
            ``info``. It takes one more backward pass for each task, and memory for T gradients. The update stays what
            it is. If losses are callables, the update is the weighted sum of their gradients, equal to rounding.
        generator: as for :class:`Aggregator`.
    """

    weighs_known_losses = False
    """Whether the weights depend on the losses of this very step, which must all be there before the backward pass."""
    has_fixed_weights = False
    """Whether the weights are numbers that are the same in every step."""

    def __init__(self, report: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.report = boolean("report", report)

    @property
    def needs_gramian(self) -> bool:  # type: ignore[override]  # it depends on the instance
        """Whether a step computes the Gramian of the task gradients."""
        return self.report

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the weights of the losses, (T,) float64 on the tasks' device, 0 for absent tasks or any number.

        Raises:
            ValueError: the tasks do not fit the method's arguments.
        """
        raise NotImplementedError

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Take a step's losses into the method's state; return the gradients of its own parameters, see `Solution`.

        A step calls it once, after :meth:`weigh`, and writes nothing before.
        """
        return ()

    def multipliers(self, weights: Tensor) -> Sequence[float | Tensor]:
        """Return what the losses are multiplied by: the entries of the result of :meth:`weigh`."""
        return weights.unbind()

    def weights(self, M: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the weights of the losses, for every Gramian in the batch. The call counts as a step.

        Args:
            M: (..., T, T), Gramians; float32 or float64.
            losses: (T,), floating, on M's device; for a method that needs them.

        Raises:
            TypeError: ``M`` or ``losses`` is not a tensor of such a dtype.
            ValueError: ``losses`` is missing, is on another device, or is not of shape (T,).
        """
        return self.solution(M, None, losses).weights

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the weights of the losses, the same for each group; see :meth:`Aggregator.solution`."""
        check_gramian(M)
        squares = None
        if self.needs_gramian:
            squares = M.detach().diagonal(dim1=-2, dim2=-1).reshape(-1, M.shape[-1]).sum(0, dtype=torch.float64)
        tasks = Tasks(M.shape[-1], M.device, present, self._known(losses, M), squares)
        with torch.no_grad():
            w, own = self.weigh(tasks), self.observe(tasks)
        w = w if present is None else torch.where(present, w, 0.0)
        return Solution(w.to(M.dtype).expand(M.shape[:-1]).clone(), unshared=w, own=own)

    def _known(self, losses: Tensor | None, rows: Tensor) -> Tensor | None:
        """Return the losses for a matrix or a Gramian, None if the method does not need them."""
        if not self.needs_losses:
            return None
        return checked_losses(losses, rows, self).detach().double()

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        if self.needs_gramian:
            return super()._aggregate(J, offsets, losses, out)
        tasks = Tasks(J.shape[0], J.device, None, self._known(losses, J))  # it needs no Gramian
        with torch.no_grad():
            w = self.weigh(tasks)
        result = combine(J, w if offsets is None else w.expand(offsets.shape[0] - 1, -1), offsets, out=out)
        with torch.no_grad():
            self.observe(tasks)  # after combine, which may refuse offsets
        return result

    def _repr_of(self, *arguments: str) -> str:
        """Return the call that makes the method; ``report`` is shown where it is set."""
        others = ["report=True"] if self.report else []
        others += [] if self.generator is None else [f"generator={self.generator!r}"]
        return f"{type(self).__name__}({', '.join([*arguments, *others])})"
