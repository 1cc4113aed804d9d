"""Untracked parameters: losses reach them and the optimizer does not hold them, so they silently stay as they are."""

import warnings
from collections.abc import Collection

from torch import Tensor

from gradkern.gradients import graph
from gradkern.gradients.losses import Loss


class Untracked:
    """The tensors that the losses of a step reach besides those that the optimizer tracks."""

    def __init__(self, tracked: Collection[Tensor]) -> None:
        self._tracked = set(tracked)
        self._found: dict[Tensor, None] = {}

    def watched(self, loss: Loss) -> Loss:
        """Return ``loss``, and note the tensors that it reaches; a callable's are noted once it runs."""
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
            self._found.update((p, None) for p in graph.leaves(value) if p not in self._tracked)
