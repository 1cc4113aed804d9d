"""The ways of a step, and what is known of each without running it."""

from collections.abc import Callable
from typing import NamedTuple

from gradkern.modifiers.sketch import Sketch
from gradkern.step.way import Way

COLUMNS = 64
"""The columns of the sketch that is tried."""
ANOTHER = "another method, no approximation of this one: it sees the gradients by the features alone"


class Candidate(NamedTuple):
    """A way that a step may take."""

    name: str
    """Its name in the table."""
    way: Way
    """The source of its Gramian, and its ending."""
    trunk: Callable[[int], int]
    """The number of its backward passes through the trunk but for torch's own, by the number of tasks."""
    takes_features: bool = False
    """Whether it takes ``features=``."""
    batched: bool = False
    """Whether all tasks go through the trunk together."""
    inexact: str = ""
    """The difference of its update from that of the rows; empty for none."""

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of ``backward`` that choose it, but for the features themselves."""
        return {"through": self.way.through} | self.way.given | ({"batched": True} if self.batched else {})


def candidates() -> list[Candidate]:
    """Return all ways. The sketch has a seed, because to draw one would move torch's default generator."""
    sketch, name, estimate = Sketch(COLUMNS, seed=0), f"Sketch({COLUMNS})", "its Gramian is an estimate"
    streamed, kept = Way("activations"), Way("activations", "kept")
    return [
        Candidate("rows", Way(), _one_each),
        Candidate("rows, features=h", Way(), _one_each, takes_features=True),
        Candidate("rows, features=h, batched", Way(), _one, takes_features=True, batched=True),
        Candidate("activations", streamed, _one_each),
        Candidate("activations, kept", kept, _one_each),
        Candidate(f"activations, {name}", streamed.but(gramian=sketch), _one_each, inexact=estimate),
        Candidate(f"activations, kept, {name}", kept.but(gramian=sketch), _one_each, inexact=estimate),
        Candidate("features", Way("features"), _one, takes_features=True, inexact=ANOTHER),
    ]


def _one(n_tasks: int) -> int:
    return 1


def _one_each(n_tasks: int) -> int:
    return n_tasks
