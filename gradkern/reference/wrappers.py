"""MGDA on divided gradients, and MGDA with a running mean of its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.reference.hull import mgda
from gradkern.reference.vectors import combine, length


def normalized_mgda(
    grads: Sequence[Tensor], aggregator: object = None, by: str = "l2", losses: Sequence[float] | None = None
) -> Tensor:
    """Return MGDA's update of gradients that are divided by their lengths, their losses, or both.

    Args:
        grads: T vectors of P numbers.
        aggregator: not looked at: it is MGDA.
        by: "l2" for lengths, "loss" for losses, "loss+" for both.
        losses: T numbers greater than 0, for "loss" and "loss+".
    """
    losses = [1.0] * len(grads) if losses is None or by == "l2" else losses
    rows = [g.double() / loss for g, loss in zip(grads, losses, strict=True)]
    if by != "loss":
        lengths = [length(g) for g in grads]
        rows = [g / n if n != 0 else g for g, n in zip(rows, lengths, strict=True)]
    return mgda(rows)


def smoothed_mgda(steps: Sequence[Sequence[Tensor]], aggregator: object = None, decay: float = 0.9) -> list[Tensor]:
    """Return the updates of consecutive steps, in which the weights of MGDA are running means (Zhou et al. 2022).

    Args:
        steps: T vectors of P numbers for each step; they are linearly independent, so that an update has one set of
            weights.
        aggregator: not looked at: it is MGDA.
        decay: the share of the mean that a step keeps.
    """
    mean: list[float] = []
    updates = []
    for grads in steps:
        J = torch.stack([g.double() for g in grads])
        w = torch.linalg.lstsq(J.mT, mgda(grads).unsqueeze(-1), driver="gelsd").solution.flatten().tolist()
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, w, strict=True)] if mean else w
        updates.append(combine(grads, mean))
    return updates
