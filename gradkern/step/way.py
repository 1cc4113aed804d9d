"""The way in which a step gets from losses to the Gramian and to the update."""

from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from gradkern.arguments import boolean, choice, instance
from gradkern.modifiers.sketch import Sketch

THROUGH = ("rows", "activations", "features")
FINISH = ("backward", "kept")
_NEEDED = {"finish": "activations", "gramian": "activations", "per_example": "features"}
"""The ``through`` that an argument needs, if it is not the default."""


class WayArguments(TypedDict, total=False):
    """The arguments that choose a way, as :func:`gradkern.backward` takes them."""

    through: str
    finish: str
    gramian: Sketch | None
    per_example: bool


@dataclass(frozen=True)
class Way:
    """A way of a step, as :func:`gradkern.backward` takes it.

    Attributes:
        through: "rows", "activations" or "features".
        finish: "backward" or "kept".
        gramian: the sketch that estimates the Gramian; None for the exact one.
        per_example: whether features count by example, and not as sums over the batch.
    """

    through: str = "rows"
    finish: str = "backward"
    gramian: Sketch | None = None
    per_example: bool = False

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError unless the arguments are as described, and go together."""
        choice("through", self.through, THROUGH)
        choice("finish", self.finish, FINISH)
        if self.gramian is not None:
            instance("gramian", self.gramian, Sketch, "a gradkern.Sketch, such as gradkern.Sketch(64), or None")
        boolean("per_example", self.per_example)
        for name, value in self.given.items():
            if _NEEDED.get(name, self.through) != self.through:
                raise ValueError(f"{name}={value!r} needs through={_NEEDED[name]!r}, got through={self.through!r}")

    @property
    def given(self) -> dict[str, object]:
        """The arguments that are not the defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(Way, name)}

    def but(self, **arguments: Unpack[WayArguments]) -> "Way":
        """Return this way with other arguments. What needs another ``through`` is left behind with this one.

        Raises:
            TypeError, ValueError: an argument is unknown, or not as described.
        """
        if not arguments:
            return self
        for name in arguments:
            if name not in WayArguments.__annotations__:
                raise TypeError(f"{name} is no argument of this call; those of its way are {', '.join(vars(self))}")
        is_same = arguments.get("through", self.through) == self.through
        return replace(self, **arguments) if is_same else Way(**arguments)

    def refuse_sums(self) -> None:
        """Raise ValueError unless micro-batches can be added up."""
        if self.through != "rows":
            raise ValueError(
                f"accumulate() adds up each task's gradients, and through={self.through!r} has none: give "
                "through='rows' for this optimizer"
            )
