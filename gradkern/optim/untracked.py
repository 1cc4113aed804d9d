"""Untracked parameters: losses reach them but the optimizer lacks them, so training silently leaves them unchanged."""

import warnings
from collections.abc import Collection

from torch import Tensor

from gradkern.gradients import graph
from gradkern.gradients.losses import Loss


class Untracked:
    """The tensors that the losses of a step reach and the optimizer does not track."""

    def __init__(self, tracked: Collection[Tensor]) -> None:
        self._tracked = set(tracked)
        self._found: dict[Tensor, None] = {}

    def watched(self, loss: Loss) -> Loss:
        """Return ``loss``, and record the tensors that it reaches; those of a callable when it runs."""
        if loss is None or not callable(loss):
            self._record(loss)
            return loss

        def watched() -> Tensor:
            value = loss()
            self._record(value)
            return value

        return watched

    def warn(self, stacklevel: int) -> None:
        """Warn if there are untracked tensors."""
        if self._found:
            shapes = ", ".join(str(tuple(p.shape)) for p in list(self._found)[:5])
            warnings.warn(
                f"the losses reach {len(self._found)} tensor(s) that require grad and are not in the optimizer; they "
                f"get no .grad. Shapes: {shapes}",
                UserWarning,
                stacklevel=stacklevel + 1,
            )

    def _record(self, value: object) -> None:
        if isinstance(value, Tensor) and value.requires_grad:
            self._found.update((p, None) for p in graph.leaves(value) if p not in self._tracked)
