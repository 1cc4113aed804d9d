"""Untracked parameters: losses reach them but the optimizer lacks them, so training silently leaves them unchanged."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gradkern.gradients import graph
from gradkern.gradients.losses import Loss
from gradkern.gradients.sharded import has_dtensors
from gradkern.warn import warn_user


class Untracked:
    """Warns once of parameters that the losses of the first step reach and an optimizer lacks.

    Other tensors that require grad, such as inputs, belong in no optimizer. The warning comes before a step writes
    anything, so one that is turned into an error ends a step that has changed nothing.
    """

    def __init__(self) -> None:
        self._done = False

    def watched(self, losses: Sequence[Loss], tracked: Callable[[], Sequence[Tensor]]) -> Sequence[Loss]:
        """Return the losses of a step, the callables such that they look for untracked parameters when they run."""
        if self._done:
            return losses
        known, found = set(tracked()), dict[Tensor, None]()
        if has_dtensors(known):  # the leaves of a graph through fully_shard are not the parameters
            self._done = True
            return losses
        still_to_run = sum(map(callable, losses))

        def look(value: object) -> None:
            if isinstance(value, Tensor) and value.requires_grad:
                reached = graph.leaves(value)
                found.update((p, None) for p in reached if isinstance(p, nn.Parameter) and p not in known)

        def watching(loss: Loss) -> Loss:
            if loss is None or not callable(loss):
                return loss

            def run() -> Tensor:
                nonlocal still_to_run
                value = loss()
                look(value)
                still_to_run -= 1
                if not still_to_run:
                    self._warn(list(found))
                return value

            return run

        for loss in losses:
            look(loss)
        if not still_to_run:
            self._warn(list(found))
        return [watching(loss) for loss in losses]

    def _warn(self, found: Sequence[Tensor]) -> None:
        self._done = True
        if found:
            shapes = ", ".join(str(tuple(p.shape)) for p in found[:5])
            warn_user(
                f"the losses reach {len(found)} parameter(s) that require grad and are not in the optimizer, so they "
                f"get no .grad and do not train: give them to the optimizer, or, if they are not to train in this "
                f"step, freeze them by requires_grad_(False). Shapes: {shapes}"
            )
