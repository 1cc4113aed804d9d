"""What a step can tell: tensors on the device, which nobody waits for until they are read."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SurgeryInfo:
    """One step's surgery over T tasks. With groups other than "model", S Gramians: a leading dimension (S,).

    Attributes:
        losses: (T,) float32 (float64 if a loss is), detached; NaN where a task was absent.
        gramian: (T, T) or (S, T, T), the dot products of the task gradients over the shared parameters; None for a
            method that needs no task gradients.
        weights: (T,) or (S, T), the weights of the task gradients in the update.
    """

    losses: Tensor
    gramian: Tensor | None
    weights: Tensor

    @cached_property
    def norms(self) -> Tensor | None:
        """(T,) or (S, T), the task gradients' Euclidean norms."""
        return None if self.gramian is None else self.gramian.diagonal(dim1=-2, dim2=-1).sqrt()

    @cached_property
    def cosines(self) -> Tensor | None:
        """(T, T) or (S, T, T), the cosines of two task gradients; 0 where either gradient is zero."""
        if self.gramian is None or self.norms is None:
            return None
        norms = self.norms
        nonzero = (norms.unsqueeze(-1) != 0) & (norms.unsqueeze(-2) != 0)
        # One root after the other: the product of two squared norms can overflow.
        cosines = self.gramian / norms.unsqueeze(-1) / norms.unsqueeze(-2)
        return torch.where(nonzero, cosines, 0.0)

    @cached_property
    def conflicts(self) -> Tensor | None:
        """(T, T) or (S, T, T) bool: which pairs of task gradients point against each other, cosine < 0."""
        return None if self.cosines is None else self.cosines < 0
