"""The choice of a step's source of task gradients: losses, or losses on features."""

from collections.abc import Sequence

from gradkern.gradients.features import Features, LossesOnFeatures
from gradkern.gradients.losses import Loss, Losses


def from_losses(losses: Sequence[Loss], features: Features | None, batched: bool, retain_graph: bool) -> Losses:
    """Return the source. Arguments are as for :func:`gradkern.backward`; opening the source checks them.

    Raises:
        ValueError: ``batched`` without ``features``.
    """
    if features is not None:
        return LossesOnFeatures(losses, features, batched, retain_graph)
    if batched:
        raise ValueError("batched=True needs features, the output of the trunk that all tasks share")
    return Losses(losses, retain_graph)
