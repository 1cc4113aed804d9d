"""The source of a step's task gradients, by what the user gives: losses, or losses on features."""

from collections.abc import Sequence

from gradkern.gradients.features import Features, LossesOnFeatures
from gradkern.gradients.losses import Loss, Losses


def from_losses(losses: Sequence[Loss], features: Features | None, batched: bool, retain_graph: bool) -> Losses:
    """Return the source; arguments are as for :func:`gradkern.backward`, and are checked when it is opened.

    Raises:
        ValueError: ``batched`` without ``features``.
    """
    if features is not None:
        return LossesOnFeatures(losses, features, batched, retain_graph)
    if batched:
        raise ValueError("batched=True needs features: what all tasks share, below which they can go together")
    return Losses(losses, retain_graph)
