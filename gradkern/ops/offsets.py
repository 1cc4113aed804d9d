"""Checks of ``offsets``, on the host before any kernel runs."""

from itertools import pairwise

import torch
from torch import Tensor

from gradkern.arguments import tensor


def check_offsets(offsets: Tensor) -> None:
    """Check everything but the values.

    Raises:
        TypeError: ``offsets`` is not a dense int64 tensor.
        ValueError: it is not on the CPU, or not of shape (S + 1,) with S >= 1.
    """
    tensor("offsets", offsets, (torch.int64,))
    if offsets.device.type != "cpu":
        raise ValueError(f"offsets must be on the CPU, got a tensor on {offsets.device}")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets must have shape (S + 1,) with S >= 1, got {tuple(offsets.shape)}")


def column_bounds(offsets: Tensor | None, P: int) -> tuple[int, ...]:
    """Return ``bounds``: segment s is the columns ``bounds[s]:bounds[s + 1]``; without ``offsets`` it is all P.

    Raises:
        TypeError, ValueError: as :func:`check_offsets`.
        ValueError: ``offsets`` does not lead from 0 to P without descending.
    """
    if offsets is None:
        return (0, P)
    check_offsets(offsets)
    bounds = tuple(offsets.tolist())
    if bounds[0] != 0 or bounds[-1] != P or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"offsets must start at 0, never descend and end at P = {P}, got {list(bounds)}")
    return bounds
