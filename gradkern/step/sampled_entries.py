"""The entries of the shared parameters' gradients that a step has drawn: all that GradAttention looks at.

They are read once, into a matrix X (T, D) that holds the groups one after another; the Gramian and the combinations of
the drawn entries alone are those of X.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.aggregators import GradAttention
from gradkern.aggregators.attention.strata import stretches
from gradkern.modifiers.suppression import Mask
from gradkern.ops import eager
from gradkern.ops.capture import ready
from gradkern.ops.layout import Tables, totals
from gradkern.ops.philox import dropped_at
from gradkern.step import rows
from gradkern.step.rows import Column


class Drawn:
    """Which entries of ``columns`` are drawn.

    Args:
        columns: as :func:`rows.columns` gives them; sparse gradients among the shared ones are made dense.
        n_segments: S.
        method: draws them.
        mask: what it drops becomes 0 in the results; None for nothing.
    """

    def __init__(self, columns: Sequence[Column], n_segments: int, method: GradAttention, mask: Mask | None) -> None:
        self.columns = columns
        self.mask = mask
        members = [[c for c in columns if c.segment == s] for s in range(n_segments)]
        self.shared = rows.dense([c for group in members for c in group])
        self.numels = tuple(c.param.numel() for c in self.shared)
        sizes = tuple(sum(c.param.numel() for c in group) for group in members)
        self.stretches = stretches(sizes, method.subset)
        self.index = method.positions(sizes, columns[0].param.device)

    def entries(self, masked: bool) -> Tensor:
        """X (T, D), zeros where the mask drops an entry if ``masked``; float64 if any gradient is, else float32."""
        grads = rows.row_major(self.shared)
        found = [
            eager.gather([g if g is not None and g.dtype == dtype else None for g in grads], self.numels, self.index)
            for dtype in self._dtypes
        ]
        if not found:
            return torch.zeros((len(self.columns[0].grads), 0), device=self.index.device)
        X = sum(found[1:], found[0])  # every entry is of one dtype and reads 0 in the others
        return X.masked_fill(self._dropped, 0.0) if masked else X

    def gramian(self, X: Tensor) -> Tensor:
        """(S, T, T), the dot products of the drawn entries."""
        return eager.gramian_tensors(self._pieces(X), self._groups, len(self._groups))

    def combine(self, X: Tensor, w: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """As :func:`rows.combine`, the result of a shared parameter being 0 wherever no entry is drawn."""
        values = X.new_empty(X.shape[1])
        into = list(values.split(self.stretches.counts))
        eager.combine_tensors(self._pieces(X), w.to(X.dtype), self._groups, into)
        kept = None
        if self.mask is not None and self.shared:
            values = values.masked_fill(self._dropped, 0.0)
            kept = 1 - self._dropped.float().mean()
        out = [c.result() for c in self.shared]
        for dtype in self._dtypes:
            of_dtype = [g if g.dtype == dtype else g.new_empty(0, dtype=dtype) for g in out]
            torch._foreach_zero_(of_dtype)
            eager.scatter(values, self.numels, self.index, of_dtype)
        results, _ = rows.combine([c for c in self.columns if c.segment is None], w, None, None)
        return [*results, *((c.param, g) for c, g in zip(self.shared, out, strict=True))], kept

    @property
    def _groups(self) -> list[int]:
        return list(range(len(self.stretches.counts)))

    @cached_property
    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(c.dtype for c in self.shared))

    def _pieces(self, X: Tensor) -> list[Tensor]:
        """X as one tensor for each task and group."""
        return [piece for row in X for piece in row.split(self.stretches.counts)]

    @cached_property
    def _dropped(self) -> Tensor:
        """(D,) bool, which of the drawn entries the mask drops."""
        assert self.mask is not None
        device = self.index.device
        bounds = ready(totals(self.numels), device).bounds_on(device)
        units = ready(_units(tuple(c.unit for c in self.shared)), device).units_on(device)
        k = torch.searchsorted(bounds, self.index, right=True) - 1
        return dropped_at(units[k] + (self.index - bounds[k]) // self.mask.block, self.mask.words)


@dataclass(frozen=True, eq=False)
class _Units(Tables):
    """The first unit of suppression of each parameter."""

    units: NDArray[np.int64]

    def units_on(self, device: torch.device) -> Tensor:
        """``units`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.units,))[0]


@lru_cache(maxsize=64)
def _units(units: tuple[int, ...]) -> _Units:
    return _Units(np.array(units, dtype=np.int64))
