"""The base class of methods around another method."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, Solution, check_gramian
from gradkern.aggregators.weightings.scalarization import Scalarization
from gradkern.arguments import instance, shown
from gradkern.ops.undo import PutBack


class Wrapper(Aggregator):
    """A method around another one, whose state is part of its own.

    Args:
        aggregator: the method within, any that looks at the Gramian. What it needs, its wrapper needs.

    Raises:
        TypeError: ``aggregator`` is no method.
        ValueError: it looks at entries of the gradients, or its weights depend on nothing in the Gramian.
    """

    needs_present = True

    fixed_weights: tuple[type[Aggregator], ...] = ()
    """The classes of fixed weights that it accepts."""

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__()
        instance("aggregator", aggregator, Aggregator, "a gradkern.Aggregator")  # type: ignore[type-abstract]
        kind = type(self).__name__
        if aggregator.needs_entries or aggregator.averages_rows or aggregator.needs_second:
            does = "looks at entries of the gradients" if aggregator.needs_entries else "keeps means of the gradients"
            does = "looks at a second batch" if aggregator.needs_second else does
            raise ValueError(
                f"aggregator must look at the Gramian alone within {kind}, and {type(aggregator).__name__} {does}; "
                f"got {shown(aggregator)}"
            )
        if isinstance(aggregator, Scalarization) and not isinstance(aggregator, self.fixed_weights):
            raise ValueError(
                f"aggregator must look at the Gramian within {kind}, and {type(aggregator).__name__} weighs losses; "
                f"got {shown(aggregator)}"
            )
        self.aggregator = aggregator

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # it depends on the method within
        """Whether the method within takes the losses."""
        return self.aggregator.needs_losses

    @property
    def needs_eps(self) -> bool:  # type: ignore[override]  # it depends on the method within
        """Whether the method within takes the precision of each group's rows."""
        return self.aggregator.needs_eps

    @property
    def uses_memory(self) -> bool:  # type: ignore[override]  # it depends on the method within
        """Whether the method within uses remembered gradients."""
        return self.aggregator.uses_memory

    @property
    def required(self) -> tuple[int, ...]:  # type: ignore[override]  # it depends on the method within
        """The numbers of the tasks that the method within needs in every step."""
        return self.aggregator.required

    def weights(self, M: Tensor, losses: Tensor | None = None) -> Tensor:
        """Return the weights; see :meth:`Aggregator.weights`.

        Args:
            M: (..., T, T), Gramians.
            losses: (..., T), on M's device, if the method or the one within needs them.

        Raises:
            TypeError, ValueError: an argument is not as described above, or does not fit the method within.
        """
        check_gramian(M)
        S, T = M.shape[:-2].numel(), M.shape[-1]
        if isinstance(losses, Tensor) and losses.ndim > 1:
            losses = losses.expand(M.shape[:-1]).reshape(S, T)
        return self.solution(M.reshape(S, T, T), None, losses).weights.view(M.shape[:-1])

    def _inner(self, M: Tensor, present: Tensor | None, losses: Tensor | None, eps: Sequence[float] | None) -> Solution:
        """Return the solution of the method within."""
        given: dict[str, Any] = {}
        if self.aggregator.needs_losses:
            given["losses"] = losses
        if self.aggregator.needs_eps:
            given["eps"] = eps
        return self.aggregator.solution(M, present, **given)

    def snapshot(self) -> PutBack:
        """Return a function that puts the state back, and that of the method within."""
        put_own_back, put_inner_back = super().snapshot(), self.aggregator.snapshot()

        def put_back() -> None:
            put_own_back()
            put_inner_back()

        return put_back

    def _state_dicts(self) -> Iterator[dict[str, Any]]:
        yield self._buffers  # the method within keeps its own


def nan_where(spoilt: Tensor, w: Tensor) -> Tensor:
    """Return weights that are not a number where ``spoilt`` says so."""
    return torch.where(spoilt, torch.nan, w)
