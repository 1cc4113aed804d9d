"""The rows of a step: its task gradients over all parameters, their Gramian, and their combination."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gradkern.gradients.param_grads import ParamGrads, new_grad_stride, own_gradients, row_major
from gradkern.modifiers.suppression import MaskState
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.philox import dropped_at

Combined = tuple[list[tuple[Tensor, Tensor]], Tensor | None]
"""Each parameter with its gradient, to which nothing else refers; and the share of entries that suppression kept, a
tensor (), or None without suppression."""


class AnyRows(Protocol):
    """Rows that have a Gramian and can be combined: all entries, or some."""

    def gramian(self, unshared: bool) -> Tensor:
        """Return the Gramians (S, T, T), or (S + 1, T, T) with the dot products over unshared parameters."""

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Combine with weights (S, T), and with (T,) for unshared parameters, None for ones."""


@dataclass(frozen=True)
class Rows:
    """The T task gradients of a step.

    Attributes:
        columns: the gradients of each parameter that any task reaches.
        n_segments: S, the number of groups.
        mask: the mask that drops entries of the results; None for none.
        products_masked: whether the mask drops them from the dot products too.
        present: (T,) bool, the tasks whose gradients belong to this step, if the others' are remembered; None if not.
        losses: (T,), NaN for an absent task; None if the method does not need them.
    """

    columns: Sequence[ParamGrads]
    n_segments: int
    mask: MaskState | None = None
    products_masked: bool = False
    present: Tensor | None = None
    losses: Tensor | None = None

    @property
    def n_tasks(self) -> int:
        """The number of tasks, T."""
        return len(self.columns[0].grads)

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.columns[0].param.device

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the task gradients within each group; float64 if any gradient is.

        Args:
            unshared: whether to add one more group, the unshared parameters.

        Returns:
            (S, T, T), or (S + 1, T, T).
        """
        columns, S = self.columns, self.n_segments
        if unshared:
            columns, S = [replace(c, segment=S) if c.segment is None else c for c in columns], S + 1
        counting = [c for c in columns if c.segment is not None]
        parts = [self._products(group, S) for group in by_dtype([c for c in counting if not c.sparse])]
        dtype = torch.float64 if any(c.dtype == torch.float64 for c in counting) else torch.float32
        if not parts:
            parts = [torch.zeros((S, self.n_tasks, self.n_tasks), dtype=dtype, device=self.device)]
        M = sum(parts[1:], parts[0]).to(dtype)
        for c in counting:
            if c.sparse:  # one parameter at a time is dense, while its dot products are computed
                M[c.segment] += self._products([replace(c.dense(), segment=0)], 1)[0]
        return M

    def _products(self, columns: Sequence[ParamGrads], n_segments: int) -> Tensor:
        mask = self.mask if self.products_masked else None
        rows = TaskGrads(row_major(columns), [c.segment for c in columns if c.segment is not None], n_segments)
        return operators.gramian_tensors(rows, mask_over(columns, mask))

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with Σ_t w[segment, t] g_t; an unshared one with Σ_t unshared_weights[t] g_t.

        A result overwrites one of its gradients if one is free. Without ``unshared_weights``, an unshared parameter
        that one task alone reaches gets that task's gradient itself.

        Args:
            w: (S, T), the weights of each group.
            unshared_weights: (T,), like ``w``; None for ones.
        """
        results = {} if unshared_weights is not None else own_gradients(self.columns)
        summed = [c for c in self.columns if c.param not in results]
        S = len(w)
        if any(c.segment is None for c in summed):
            w = torch.cat((w, torch.ones_like(w[:1]) if unshared_weights is None else unshared_weights.unsqueeze(0)))
        kept = None if self.mask is None else self.mask.state.new_zeros(())
        dense = by_dtype([c for c in summed if not c.sparse])
        for group in dense:
            out = [c.result() for c in group]
            segments = [S if c.segment is None else c.segment for c in group]
            rows = TaskGrads(row_major(group), segments, len(w))
            ws = w.to(arithmetic_dtype(out[0].dtype))
            operators.combine_tensors(rows, ws, out, mask_over(group, self.mask), kept)
            results.update(zip((c.param for c in group), out, strict=True))
        for c in summed:
            if c.sparse:
                results[c.param] = _combine_sparse(c, w[S if c.segment is None else c.segment], self.mask)
        share = kept_share(kept, summed) if kept is not None and dense else None
        return [(c.param, results[c.param]) for c in self.columns], share


def kept_share(kept: Tensor, columns: Sequence[ParamGrads]) -> Tensor | None:
    """Return the share of entries of masked ``columns`` that the mask kept; None if no column is masked.

    Sparse gradients do not count, because most of their entries are absent anyway.
    """
    n_masked = sum(c.param.numel() for c in columns if c.unit >= 0 and not c.sparse)
    return kept / n_masked if n_masked else None


def mask_over(columns: Sequence[ParamGrads], mask: MaskState | None) -> Mask | None:
    """Return the mask of ``columns`` in the form that the operators take."""
    return None if mask is None else Mask([c.unit for c in columns], mask.block, mask.state)


def by_dtype(columns: Sequence[ParamGrads]) -> list[list[ParamGrads]]:
    """Return the columns in lists of one dtype each."""
    groups: dict[torch.dtype, list[ParamGrads]] = defaultdict(list)
    for c in columns:
        groups[c.dtype].append(c)
    return list(groups.values())


def _combine_sparse(c: ParamGrads, w: Tensor, mask: MaskState | None) -> Tensor:
    """Return the scaled entries of all tasks, concatenated; torch adds up equal indices when it coalesces."""
    present = [(t, g) for t, g in enumerate(c.grads) if g is not None]
    indices = torch.cat([g._indices() for _, g in present], 1)
    values = torch.cat([torch.where(w[t] == 0, 0.0, w[t] * g._values()).to(g.dtype) for t, g in present])
    if mask is not None and c.unit >= 0:
        units = c.unit + _places(indices, c.param) // mask.block
        values = values.masked_fill(dropped_at(units, mask.state), 0.0)
    return torch.sparse_coo_tensor(indices, values, c.param.shape, check_invariants=False)


def _places(indices: Tensor, p: Tensor) -> Tensor:
    """Return the positions of a sparse gradient's entries in a dense one's memory, in the shape of its values."""
    strides = new_grad_stride(p)
    n = len(indices)
    places = sum((i * stride for i, stride in zip(indices, strides[:n], strict=True)), torch.zeros_like(indices[0]))
    for size, stride in zip(p.shape[n:], strides[n:], strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device=indices.device)
    return places
