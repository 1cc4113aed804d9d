"""What a step can tell: tensors on the device, which nobody waits for until they are read."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gradkern.cosines import cosines


@dataclass(frozen=True, eq=False)
class SurgeryInfo:
    """One step's surgery over T tasks. With groups other than "model", S Gramians: a leading dimension (S,).

    Attributes:
        losses: (T,) float32 (float64 if a loss is), detached; NaN where a task was absent.
        gramian: (T, T) or (S, T, T), the dot products of the task gradients over the shared parameters: of the kept
            entries alone under ``Suppression(scope="all")``, of drawn ones under ``GradAttention(update="subset")``.
            None for a method that needs no task gradients.
        weights: (T,) or (S, T), the weights of the task gradients in the update.
        targets: (T, T) or (S, T, T) float64, the cosines that GradVac aims at, as they are after the step; None for
            other methods.
        attention: (T,) or (S, T), what GradAttention gives to each task, summing to 1; None for other methods.
        kept: (), the share of the shared parameters' entries, or of the drawn ones, that suppression kept; of dense
            gradients alone, and None where there are none.
        step_scale: (), κ, by which ``ConflictLR`` scales the optimizer's step; None without.
        total_norm: (), the gradient's norm over all parameters before ``update(max_norm=...)`` cut it; None without.
    """

    losses: Tensor
    gramian: Tensor | None
    weights: Tensor
    targets: Tensor | None = None
    attention: Tensor | None = None
    kept: Tensor | None = None
    step_scale: Tensor | None = None
    total_norm: Tensor | None = None

    @cached_property
    def norms(self) -> Tensor | None:
        """(T,) or (S, T), the task gradients' Euclidean norms."""
        return None if self.gramian is None else self.gramian.diagonal(dim1=-2, dim2=-1).sqrt()

    @cached_property
    def cosines(self) -> Tensor | None:
        """(T, T) or (S, T, T), the cosines of two task gradients; 0 where either gradient is zero."""
        return None if self.gramian is None else cosines(self.gramian)

    @cached_property
    def conflicts(self) -> Tensor | None:
        """(T, T) or (S, T, T) bool: which pairs of task gradients point against each other, cosine < 0."""
        return None if self.cosines is None else self.cosines < 0
