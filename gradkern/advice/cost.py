"""The cost of one way of a step."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of one way of a step, over plain training's backward pass.

    Attributes:
        name: the way.
        arguments: the arguments of ``backward`` that choose it, but for ``features`` themselves.
        needs_features: whether ``features`` must be given with them.
        is_exact: whether its update is that of the rows.
        status: "measured", "predicted" or "refused".
        notes: why it is refused, how it was predicted, what sets its update apart.
        memory: the bytes of its peak memory above plain's; None where that was not measured.
        trunk: the number of backward passes through what tasks share; plain has ``Advice.plain_passes``. None if the
            way is refused, as ``heads`` and ``time``.
        heads: the number of backward passes through what one task has alone.
        time: its seconds divided by plain's.
    """

    name: str
    arguments: Mapping[str, object]
    needs_features: bool
    is_exact: bool
    status: str
    notes: tuple[str, ...] = ()
    memory: int | None = None
    trunk: int | None = None
    heads: int | None = None
    time: float | None = None

    @property
    def call(self) -> str:
        """The arguments as they are written in a call."""
        given = ["features=h"] if self.needs_features else []
        return ", ".join([*given, *(f"{name}={_written(value)}" for name, value in self.arguments.items())])


def _written(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
