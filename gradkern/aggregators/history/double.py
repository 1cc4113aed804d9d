"""The base class of methods with double sampling: weights that move by the gradients of two batches.

The Gramian of a noisy batch is biased: its diagonal has the noise's variance too. The dot products of two independent
batches' gradients, M = J1 J2ᵀ, have no such bias, so weights that move along them are right in the mean.
"""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from gradkern.aggregators.base import Solution, check_gramian, in_dtype
from gradkern.aggregators.solvers.arrays import Array, carried, every, space
from gradkern.aggregators.solvers.simplex import on_simplex
from gradkern.aggregators.task_state import TaskState
from gradkern.arguments import tensor
from gradkern.ops import combine, operators
from gradkern.ops.matrix import readable
from gradkern.ops.out import check_out

SUMMED = 1e-14
"""The sum of weights on the simplex differs from 1 by less."""


class DoubleSampling(TaskState):
    """A method whose weights move on the simplex, along M = J1 J2ᵀ of the gradients of two independent batches.

    Pass ``second``, the same tasks' losses on another batch, to ``backward`` or ``update``. The update is of the first
    batch's gradients alone. The second batch takes T more backward passes, and its gradients are kept until the end of
    the step, as much memory as the task gradients.

    The weights of each group start from 1/T. Absent tasks have the weight 0 in a step; their own weights wait, and
    those of the present tasks are projected onto a simplex of their own. A step whose M is not finite gives weights
    that are not, and moves none.

    Attributes:
        task_weights: (S, T) float64, for each group and task; None before the first step.
    """

    uses_memory = False
    needs_second = True
    kept: ClassVar[tuple[str, ...]] = ("task_weights",)
    task_weights: Tensor | None

    def weights(self, M: Tensor) -> Tensor:
        """Return the weights after a step along M; see :meth:`Aggregator.weights`.

        Args:
            M: (..., T, T), the dot products of two batches' gradients, M_ij that of task i's in the first batch and
                task j's in the second. It need not be symmetric.
        """
        check_gramian(M)
        S, T = M.shape[:-2].numel(), M.shape[-1]
        return self._moved(M.reshape(S, T, T), None).view(M.shape[:-1])

    def solution(
        self, M: Tensor, present: Tensor | None, losses: Tensor | None = None, cross: Tensor | None = None
    ) -> Solution:
        """Return the present tasks' weights after this step; see :meth:`Aggregator.solution`.

        Args:
            M: the Gramian of the first batch, which is not looked at.
            present: as for :meth:`Aggregator.solution`.
            losses: not needed.
            cross: (S, T, T), as M for :meth:`weights`.
        """
        assert cross is not None, "a step hands it on"
        return Solution(self._moved(cross, present))

    def forward(  # type: ignore[override]  # a second batch in place of losses
        self,
        J: Tensor,
        offsets: Tensor | None = None,
        *,
        second: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the update wᵀ J of a matrix of task gradients; see :meth:`Aggregator.forward`.

        Args:
            J: (T, P), the first batch's gradients.
            offsets: as for :meth:`Aggregator.forward`.
            second: (T, P), the second batch's gradients, of J's dtype and on its device.
            out: as for :meth:`Aggregator.forward`.

        Raises:
            TypeError, ValueError: an argument is not as described above. The method's state is as before.
        """
        X = readable(J, offsets)
        if second is None:
            raise ValueError(f"second must be the gradients of another batch, which {self!r} needs; got None")
        tensor("second", second, (J.dtype,))
        if second.shape != J.shape or second.device != J.device:
            raise ValueError(
                f"second must be {tuple(J.shape)} on {J.device} as J is, got {tuple(second.shape)} on {second.device}"
            )
        check_out(out, J)
        M = operators.cross(X.detach(), readable(second, None).detach(), offsets)
        return combine(X, self.weights(M), offsets, out=out)

    def _moved(self, M: Tensor, present: Tensor | None) -> Tensor:
        """Move the weights by M (S, T, T), and return those of the update."""
        check_gramian(M)
        before = self._kept_for("task_weights", M, 1 / M.shape[-1])
        w, kept = _step(M, before, present, self)
        self._keep("task_weights", M, kept)
        return in_dtype(w, M)

    @abstractmethod
    def moved(self, M: Array, w: Array, there: Array | None) -> Array:
        """Return the weights after a step.

        Args:
            M: (S, T, T) float64, as for :meth:`weights`, with zeros for absent tasks.
            w: (S, T), the weights before, on the simplex of the present tasks.
            there: (T,) bool, the tasks that are present; None for all.
        """

    def of_update(self, w: Array, there: Array | None) -> Array:
        """Return the weights of the gradients in the update, from those that the method keeps."""
        return w


@carried
def _step(M: Array, before: Array, there: Array | None, method: DoubleSampling) -> tuple[Array, Array]:
    """Return the weights (S, T) of the update, and those that the method keeps."""
    xp, start = space(M), before
    if there is not None:
        M = xp.where(there[..., None] & there, M, 0.0)
        start = xp.where(there, before, 0.0)
    if not every(abs(start.sum(-1) - 1) < SUMMED):  # tasks were absent, or the host may not know
        start = on_simplex(start, there)
    w = method.moved(M, start, there)
    failed = (0.0 * M).sum((-2, -1))[..., None]  # not a number if an entry is not finite, else 0
    moves = failed == 0 if there is None else (failed == 0) & there
    return method.of_update(w, there) + failed, xp.where(moves, w, before)
