"""What is told of a method: its class, its twin in the reference, its source, and the laws that it obeys."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator


class Paper(NamedTuple):
    """Source of a method. A report without a known author has only a title."""

    author: str | None
    year: int | None
    title: str


class Laws(NamedTuple):
    """Laws that the first update of a method obeys. The tests check them for every method.

    Attributes:
        degree: the power of s by which the update grows if all gradients grow by a factor s > 0.
        invariant: the quantity that does not change if one task's gradient grows: all "weights", the "update", or None.
        equivariant: whether a permutation of the tasks leaves the update unchanged.
        no_conflict: the update of gradients without conflict: their "sum", their "mean", or None for neither.
        zero_row: the effect of a task whose gradient is zero: it is "ignored", or None for another one.
    """

    degree: int = 1
    invariant: Literal["weights", "update"] | None = None
    equivariant: bool = True
    no_conflict: Literal["sum", "mean"] | None = None
    zero_row: Literal["ignored"] | None = None


@dataclass(frozen=True)
class Method:
    """A method of gradient surgery: its name, its class, its naive twin, its source and its laws.

    Attributes:
        name: the name on the command line and in tables.
        aggregator: the class.
        twin: the name of the same method in :mod:`gradkern.reference`. It computes the update of one step from its task
            gradients, or with ``state`` the updates of consecutive steps, of the first ones at least. It takes the
            arguments of the class by name, and ``order`` if the method draws orders.
        paper: the publication.
        laws: the laws that its updates obey.
        arguments: the arguments of the class, by name, that select this method.
        tasks: the number of tasks that the arguments are made for; None for any.
        draws: the random choices: the "order" of partners, which ``order=`` fixes; "entries" of the gradients; the
            "weights"; or None.
        state: whether a step depends on earlier steps.
        losses: whether it takes the losses of the tasks.
    """

    name: str
    aggregator: type[Aggregator]
    twin: str
    paper: Paper
    laws: Laws
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tasks: int | None = None
    draws: Literal["order", "entries", "weights"] | None = None
    state: bool = False
    losses: bool = False

    def make(self, order: Sequence[Sequence[int]] | None = None, **more: Any) -> Aggregator:
        """Return an aggregator. With ``order`` its choices are the twin's; a method that draws none ignores it."""
        if self.draws == "order" and order is not None:
            more["order"] = order
        if self.draws == "weights" and order is not None:
            more.setdefault("generator", torch.Generator().manual_seed(0))
        return self.aggregator(**self.arguments, **more)

    def seeded(self, seed: int, device: torch.device | str = "cpu") -> Aggregator:
        """Return an aggregator whose random choices follow from ``seed``."""
        if self.draws is None:
            return self.make()
        return self.make(generator=torch.Generator(device).manual_seed(seed))

    def beside(self, J: Tensor, step: int = 0) -> dict[str, Tensor]:
        """Return what a call of the aggregator takes beside a matrix (T, P), in comparisons: losses, or nothing."""
        return {"losses": torch.tensor(_losses(len(J), step), device=J.device)} if self.losses else {}

    def expected(
        self,
        steps: Sequence[Sequence[Tensor]],
        order: Sequence[Sequence[int]],
        losses: Sequence[Sequence[float]] | None = None,
        **more: Any,
    ) -> list[Tensor]:
        """Return the twin's updates: float64 vectors, one for each step that it supports.

        Args:
            steps: the task gradients of each step.
            order: row i is the order in which task i visits the others.
            losses: the losses of each step; None for those of :meth:`beside`.
            more: arguments besides those of the row.
        """
        from gradkern import reference  # not at start-up: programs that train do not compare

        twin: Callable[..., Any] = getattr(reference, self.twin)
        if self.draws == "order":
            more["order"] = order
        losses = losses or [_losses(len(grads), step) for step, grads in enumerate(steps)]
        if self.state or self.draws == "weights":
            return twin(steps, **({"losses": losses} if self.losses else {}), **self.arguments, **more)
        of_steps = [{"losses": of_step} if self.losses else {} for of_step in losses]
        return [twin(grads, **given, **self.arguments, **more) for grads, given in zip(steps, of_steps, strict=True)]


def _losses(T: int, step: int) -> list[float]:
    """Return losses from 1 to 3, which differ from task to task and from step to step."""
    return [1 + 0.5 * ((2 * i + 3 * step) % 5) for i in range(T)]
