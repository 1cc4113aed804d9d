"""Sampled entries of the shared parameters' gradients, the input of GradAttention.

They are read once, into a matrix X (T, D) that holds the groups one after another. The Gramian and the combinations of
the sampled entries are computed from X.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.aggregators import GradAttention, Solution
from gradkern.aggregators.attention.strata import strata
from gradkern.gradients.plan import Column
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.capture import ready
from gradkern.ops.layout import Tables, totals
from gradkern.ops.philox import dropped_at
from gradkern.step.rows import Combined, Rows


class SampledRows:
    """The sampled entries of a step's rows.

    Args:
        rows: the rows; sparse gradients of shared parameters are made dense.
        method: the method, which samples the entries.

    Attributes:
        only: whether only the sampled entries are updated.
        X: (T, D), the entries; 0 where the mask drops them from the dot products. float64 if any gradient is, else
            float32.
    """

    def __init__(self, rows: Rows, method: GradAttention) -> None:
        self.rows = rows
        self.method = method
        self.only = method.update == "subset"
        members = [[c for c in rows.of_params.shared if c.segment == s] for s in range(rows.n_segments)]
        self.shared: list[Column] = [c for group in members for c in group]
        self.numels = tuple(c.numel for c in self.shared)
        sizes = tuple(sum(c.numel for c in group) for group in members)
        self.strata = strata(sizes, method.subset)
        self.index = method.positions(sizes, rows.device)
        self.X = self._entries()

    def gramian(self, unshared: bool) -> Tensor:
        """Return the Gramians (S, T, T) of the sampled entries; unshared parameters have none."""
        return operators.gramian_tensors(self._pieces(), None)

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Combine as :meth:`Rows.combine` does; a shared parameter's result is 0 except at sampled entries."""
        mask = self.rows.mask
        values = self.X.new_empty(self.X.shape[1])
        into = list(values.split(self.strata.counts))
        operators.combine_tensors(self._pieces(), w.to(self.X.dtype), into, None, None)
        share = None
        if mask is not None and self.shared:
            values = values.masked_fill(self._dropped, 0.0)
            share = 1 - self._dropped.float().mean()
        results = self.rows.results()
        out = results.memory(self.shared)
        for dtype in self._dtypes:
            of_dtype = [g if g.dtype == dtype else g.new_empty(0, dtype=dtype) for g in out]
            torch._foreach_zero_(of_dtype)
            operators.scatter(values, self.numels, self.index, of_dtype)
        unshared = self.rows.only(c for c in self.rows.of_params.columns if c.segment is None)
        return [*unshared.combine(w, unshared_weights)[0], *results.pairs()], share

    def solution(self, M: Tensor) -> Solution:
        """Return the method's solution for Gramians (S, T, T), with weights of 0 for absent tasks."""
        present = self.rows.present
        if self.shared:
            attention = self.method.weights(M, self.strata.tokens(self.X))
        else:  # no shared parameters: nothing to weigh and nothing to learn from
            attention = torch.full_like(M[:, 0], 1 / M.shape[-1])
        w = attention if present is None else torch.where(present, attention, 0.0)
        return Solution(w, attention=attention)

    def _entries(self) -> Tensor:
        """Return :attr:`X`."""
        rows = self.rows
        if not self.shared:
            return torch.zeros((rows.n_tasks, 0), device=self.index.device)
        X = rows.entries(self.shared, self.numels, self.index)
        if rows.products_masked:
            X = X.masked_fill(self._dropped, 0.0)
        if rows.present is not None:  # a remembered overflow must not spoil other tasks
            X = X.masked_fill(~rows.present.unsqueeze(-1) & ~X.isfinite(), 0.0)
        return X

    @cached_property
    def _dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(c.dtype for c in self.shared))

    def _pieces(self) -> TaskGrads:
        """Return X as one tensor for each task and group."""
        groups = range(len(self.strata.counts))
        pieces: Sequence[Tensor] = [piece for row in self.X for piece in row.split(self.strata.counts)]
        return TaskGrads(pieces, list(groups), len(groups))

    @cached_property
    def _dropped(self) -> Tensor:
        """The sampled entries that the mask drops, (D,) bool."""
        mask, device = self.rows.mask, self.index.device
        assert mask is not None
        bounds = ready(totals(self.numels), device).bounds_on(device)
        units = ready(_units(tuple(c.unit for c in self.shared)), device).units_on(device)
        k = torch.searchsorted(bounds, self.index, right=True) - 1
        return dropped_at(units[k] + (self.index - bounds[k]) // mask.block, mask.state)


@dataclass(frozen=True, eq=False)
class _Units(Tables):
    """The numbers of the parameters' first units of suppression."""

    units: NDArray[np.int64]

    def units_on(self, device: torch.device) -> Tensor:
        """Return ``units`` on ``device``, copied there once."""
        return self._once((device,), lambda: (self.units,))[0]


@lru_cache(maxsize=64)
def _units(units: tuple[int, ...]) -> _Units:
    return _Units(np.array(units, dtype=np.int64))
