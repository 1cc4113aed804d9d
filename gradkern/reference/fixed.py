"""Sums of task gradients with fixed weights."""

from collections.abc import Sequence

from torch import Tensor

from gradkern.reference.vectors import combine


def weighted_sum(grads: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the sum of the gradients, or their weighted sum: unitary scalarization (Kurin et al. 2022)."""
    return combine(grads, [1.0] * len(grads) if weights is None else weights)


def mean(grads: Sequence[Tensor]) -> Tensor:
    """Return the mean of the gradients."""
    return weighted_sum(grads) / len(grads)
