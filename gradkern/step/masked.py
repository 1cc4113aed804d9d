"""The mask of gradient suppression over columns, as operators take it."""

from collections.abc import Sequence

from torch import Tensor

from gradkern.gradients.plan import Column
from gradkern.modifiers.suppression import MaskState
from gradkern.ops.arguments import Mask


def kept_share(kept: Tensor, columns: Sequence[Column]) -> Tensor | None:
    """Return the share of entries of masked ``columns`` that the mask kept; None if no column is masked.

    Sparse gradients do not count, because most of their entries are absent anyway.
    """
    n_masked = sum(c.numel for c in columns if c.unit >= 0 and not c.sparse)
    return kept / n_masked if n_masked else None


def mask_over(columns: Sequence[Column], mask: MaskState | None) -> Mask | None:
    """Return the mask of ``columns`` in the form that the operators take."""
    return mask_of([c.unit for c in columns], mask)


def mask_of(units: Sequence[int], mask: MaskState | None) -> Mask | None:
    """Return a mask in the form that the operators take, by the first unit of each column."""
    return None if mask is None else Mask(units, mask.block, mask.state)
