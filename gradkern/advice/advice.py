"""The costs of all ways of a step, and the choice of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gradkern.advice.cost import Cost
from gradkern.advice.table import counted, seconds, size, text

TIES = 1.05
"""Ways whose times differ by less than this factor are equally fast."""
MATTERS = 0.5
"""The share of the parameters' size from which on memory that another way saves is told."""


@dataclass(frozen=True)
class Advice:
    """The costs of all ways of a step, measured on one step, and which one to take. ``print`` shows the table.

    Attributes:
        rows: the costs, one for each way.
        method: the method, as its ``repr`` shows it.
        n_tasks: the number of tasks that were present.
        parameter_bytes: the size of the parameters that train, P.
        plain_seconds: the seconds of plain training's backward pass, with the forward passes of callables.
        plain_passes: the number of its passes through what tasks share: one, or one for each callable.
    """

    rows: Sequence[Cost]
    method: str
    n_tasks: int
    parameter_bytes: int
    plain_seconds: float
    plain_passes: int

    @cached_property
    def best(self) -> Cost | None:
        """The way to take: the fastest exact one, and of equally fast ones that with the least memory.

        None if the memory of the device was too small for all of them.
        """
        exact = self._exact()
        if not exact:
            return None
        fastest = min(time for _, time in exact)
        return min((cost for cost, time in exact if time <= TIES * fastest), key=_memory)

    @cached_property
    def smallest(self) -> Cost | None:
        """The exact way with the least memory, if that saves more than half of the parameters' size; else None."""
        if self.best is None:
            return None
        least = min((cost for cost, _ in self._exact()), key=_memory)
        saved = _memory(self.best) - _memory(least)
        return least if saved > MATTERS * self.parameter_bytes else None

    def _exact(self) -> list[tuple[Cost, float]]:
        return [(cost, cost.time) for cost in self.rows if cost.is_exact and cost.time is not None]

    def __str__(self) -> str:
        head = (
            f"{counted(self.n_tasks, 'task')} by {self.method}; P = {size(self.parameter_bytes)}, the parameters that "
            f"train. Plain training takes {seconds(self.plain_seconds)} for "
            f"{counted(self.plain_passes, 'backward pass')}."
        )
        return text(head, self.rows, self.parameter_bytes, self.best, self.smallest)


def _memory(cost: Cost) -> int:
    return 0 if cost.memory is None else cost.memory
