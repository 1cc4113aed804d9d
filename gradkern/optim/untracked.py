"""Parameters that losses reach and an optimizer does not hold: they stay as they are, which nobody may have meant."""

import warnings
from collections.abc import Collection

from torch import Tensor

from gradkern.gradients import graph
from gradkern.gradients.losses import Loss


class Outside:
    """What the losses of a step reach besides ``inside``."""

    def __init__(self, inside: Collection[Tensor]) -> None:
        self._inside = set(inside)
        self._found: dict[Tensor, None] = {}

    def watched(self, loss: Loss) -> Loss:
        """``loss``; what it would have trained besides, had ``backward`` been torch's own, is noted."""
        if loss is None or not callable(loss):
            self._look(loss)
            return loss

        def watched() -> Tensor:
            value = loss()
            self._look(value)
            return value

        return watched

    def warn(self, stacklevel: int) -> None:
        """Warn if anything was found."""
        if self._found:
            shapes = ", ".join(str(tuple(p.shape)) for p in list(self._found)[:5])
            warnings.warn(
                f"the losses reach {len(self._found)} tensor(s) that require grad and are not in the optimizer; they "
                f"get no .grad. Shapes: {shapes}",
                UserWarning,
                stacklevel=stacklevel + 1,
            )

    def _look(self, value: object) -> None:
        if isinstance(value, Tensor) and value.requires_grad:
            self._found.update((p, None) for p in graph.leaves(value) if p not in self._inside)
