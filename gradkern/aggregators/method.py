"""The description of a method: its class, its twin in the reference, its source, and the laws that it obeys."""

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
        degree: the power of s by which the update grows if all gradients grow by a factor s > 0; None for no power.
        invariant: the quantity that does not change if one task's gradient grows: all "weights", the "update", or None.
        equivariant: whether a permutation of the tasks leaves the update unchanged.
        no_conflict: the update of gradients without conflict: their "sum", their "mean", or None for neither.
        zero_row: the effect of a task whose gradient is zero: it is "ignored", or None for another one.
        single: the update of a single task: its "gradient", or a vector of its "direction".
    """

    degree: int | None = 1
    invariant: Literal["weights", "update"] | None = None
    equivariant: bool = True
    no_conflict: Literal["sum", "mean"] | None = None
    zero_row: Literal["ignored"] | None = None
    single: Literal["gradient", "direction"] = "gradient"


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
            "weights" themselves, for which class and twin draw the same numbers from equal generators; "signs", which
            ``seed=`` fixes; or None.
        state: whether a step depends on earlier steps.
        losses: whether it takes the losses of the tasks.
        second: whether it takes a second batch.
        compared: arguments of comparisons with the twin, in which roundings do not grow.
    """

    name: str
    aggregator: type[Aggregator]
    twin: str
    paper: Paper
    laws: Laws
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tasks: int | None = None
    draws: Literal["order", "entries", "weights", "signs"] | None = None
    state: bool = False
    losses: bool = False
    second: bool = False
    compared: Mapping[str, Any] = field(default_factory=dict)

    def make(
        self, order: Sequence[Sequence[int]] | None = None, device: torch.device | str = "cpu", **more: Any
    ) -> Aggregator:
        """Return an aggregator; ``more`` overrides the arguments.

        With ``order`` its choices of partners and weights are those of :meth:`expected`.
        """
        return self.aggregator(**{**self.arguments, **self._fixed(order, device), **more})

    def seeded(self, seed: int, device: torch.device | str = "cpu") -> Aggregator:
        """Return an aggregator whose random choices follow from ``seed``."""
        if self.draws is None:
            return self.make()
        if self.draws == "signs":
            return self.make(seed=seed)
        return self.make(generator=torch.Generator(device).manual_seed(seed))

    def beside(self, J: Tensor, step: int = 0) -> dict[str, Tensor]:
        """Return what a call of the aggregator takes beside a matrix (T, P), in comparisons.

        It is the losses, a second batch's gradients, or nothing.
        """
        given = {"losses": torch.tensor(_losses(len(J), step), device=J.device)} if self.losses else {}
        return {**given, "second": _second(J, step)} if self.second else given

    def expected(
        self,
        steps: Sequence[Sequence[Tensor]],
        order: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        losses: Sequence[Sequence[float]] | None = None,
        **more: Any,
    ) -> list[Tensor]:
        """Return the twin's updates: float64 vectors, one for each step that it supports.

        Args:
            steps: the task gradients of each step.
            order: row i is the order in which task i visits the others.
            device: the device of the aggregator that the updates are compared with.
            losses: the losses of each step; None for those of :meth:`beside`, if the method takes losses.
            more: arguments besides those of the row.
        """
        from gradkern import reference  # not at start-up: programs that train do not compare

        twin: Callable[..., Any] = getattr(reference, self.twin)
        more |= self._fixed(order, device)
        if losses is None and self.losses:
            losses = [_losses(len(grads), step) for step, grads in enumerate(steps)]
        if self.second:
            more["seconds"] = [_second(torch.stack(list(grads)), step) for step, grads in enumerate(steps)]
        if self.state:
            return twin(steps, **({} if losses is None else {"losses": losses}), **self.arguments, **more)
        of_steps = [{}] * len(steps) if losses is None else [{"losses": of_step} for of_step in losses]
        return [twin(grads, **given, **self.arguments, **more) for grads, given in zip(steps, of_steps, strict=True)]

    def _fixed(self, order: Sequence[Sequence[int]] | None, device: torch.device | str) -> dict[str, Any]:
        """Return the arguments that make class and twin comparable: they fix the random choices, for example."""
        if order is None or self.draws in (None, "entries"):
            return {} if order is None else dict(self.compared)
        if self.draws == "weights":
            return {"generator": torch.Generator(device).manual_seed(0)}
        return {"order": order} if self.draws == "order" else {"seed": 0}


def _losses(T: int, step: int) -> list[float]:
    """Return losses from 1 to 3, which differ from task to task and from step to step."""
    return [1 + 0.5 * ((2 * i + 3 * step) % 5) for i in range(T)]


def _second(J: Tensor, step: int) -> Tensor:
    """Return the gradients of a second batch: those of J with noise, which differs from step to step."""
    noise = torch.randn(J.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float32, device="cpu")
    return J.detach() * (1 + 0.3 * noise).to(J.device, J.dtype)
