"""The choice of a step's source of task gradients: losses, or losses on features."""

from collections.abc import Sequence

from gradkern.arguments import boolean
from gradkern.gradients.features import Features, LossesOnFeatures
from gradkern.gradients.losses import Loss, Losses


def from_losses(losses: Sequence[Loss], features: Features | None, batched: bool, retain_graph: bool) -> Losses:
    """Return the source. Arguments are as for :func:`gradkern.backward`; opening the source checks the first two.

    Raises:
        TypeError: ``batched`` or ``retain_graph`` is not a bool.
        ValueError: ``batched`` without ``features``.
    """
    boolean("batched", batched)
    boolean("retain_graph", retain_graph)
    if features is not None:
        return LossesOnFeatures(losses, features, batched, retain_graph)
    if batched:
        raise ValueError("batched=True needs features, the output of the trunk that all tasks share")
    return Losses(losses, retain_graph)
