"""The rows of a step: its task gradients over all parameters, their Gramian, and their combination."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from gradkern.gradients.embeddings import added_up
from gradkern.gradients.layouts import PLANS, Row
from gradkern.gradients.param_grads import laid_out, new_grad, owned, owns_its_storage
from gradkern.gradients.plan import Arrangement, Batch, Column
from gradkern.modifiers.suppression import MaskState
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.masked import kept_share, mask_of
from gradkern.step.of_params import OfParams
from gradkern.step.sparse_rows import combine_sparse, drop_masked, rows_that_occur

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
class Rows(OfParams):
    """The T task gradients of a step, each tensor where autograd put it.

    Attributes:
        params: n parameters.
        grads: T rows of n gradients, as :func:`gradkern.gradients.param_grads.readable` returns them.
        arrangement: the columns of ``grads``.
        mask: the mask that drops entries of the results; None for none.
        products_masked: whether the mask drops them from the dot products too.
        present: (T,) bool, the tasks whose gradients belong to this step, if the others' are remembered; None if not.
        losses: (T,), NaN for an absent task; None if the method does not need them.
        loss_scale: (), what a gradient scaler has multiplied all gradients by; None for nothing.
        overwrite: whether gradients may be overwritten once they are combined.
        second: T rows of n dense gradients of a second batch; None without one.
        compact: the places of parameters whose gradients the step has made sparse; their results are dense.
        finite: (), whether all gradients behind rows that are means are finite; None if the rows are no means. If not,
            the Gramian shows it, for the means stay as they were.
    """

    params: Sequence[Tensor]
    grads: Sequence[Row]
    arrangement: Arrangement
    mask: MaskState | None = None
    products_masked: bool = False
    present: Tensor | None = None
    losses: Tensor | None = None
    loss_scale: Tensor | None = None
    overwrite: bool = False
    second: Sequence[Row] | None = None
    compact: frozenset[int] = frozenset()
    finite: Tensor | None = None
    _given: dict[tuple[Batch, int], TaskGrads] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_tasks(self) -> int:
        """The number of tasks, T."""
        return len(self.grads)

    @property
    def n_segments(self) -> int:
        """The number of groups, S."""
        return self.arrangement.n_segments

    @property
    def eps(self) -> tuple[float, ...] | None:
        """The spacing of numbers at 1 in the arithmetic of each group's rows, S numbers; None if all rows have one."""
        return eps_of(self.arrangement)

    def is_compact(self, c: Column) -> bool:
        """Return whether a column's gradients are sparse and its result is dense."""
        return c.sparse and c.place in self.compact

    def only(self, columns: Iterable[Column]) -> "Rows":
        """Return the rows of ``columns``."""
        return replace(self, arrangement=self.arrangement.of(columns))

    def column(self, c: Column) -> list[Tensor | None]:
        """Return a parameter's gradients."""
        return [row[c.place] for row in self.grads]

    def dense(self, c: Column) -> list[Tensor | None]:
        """Return a parameter's gradients, with dense copies of sparse ones."""
        column = self.column(c)
        if not c.sparse:
            return column
        return [None if g is None else laid_out(g, self.params[c.place]) for g in column]

    def entries(self, columns: Sequence[Column], numels: Sequence[int], index: Tensor) -> Tensor:
        """Return some entries of each row, (T, D); float64 if any gradient is, else float32.

        Args:
            columns: parameters, one or more, one after another.
            numels: their numbers of elements.
            index: (D,) int64, ascending positions in them.
        """
        grads = [g for row in zip(*map(self.dense, columns), strict=True) for g in row]
        return gathered(grads, numels, index)

    def results(self) -> "Results":
        """Return what takes a combination's results, one for each parameter."""
        return Results(self)

    def by_replicas(self) -> Iterator[tuple[int, "Rows"]]:
        """Yield each number of ranks that hold the same numbers, and the rows of the columns with so many."""
        yield 1, self

    def origin(self, c: Column) -> tuple[int, int]:
        """Return the place of a column's parameter, and where the column begins in it."""
        return c.place, 0

    def share_of(self, kept: Sequence[tuple[int, Tensor]]) -> Tensor | None:
        """Return the share of entries that the mask kept, from their counts in :meth:`by_replicas`."""
        ((_, count),) = kept
        return kept_share(count, self.arrangement.columns)

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield each dense column under surgery, and the gradients of the tasks that reach it."""
        for c in self.arrangement.shared:
            if not c.sparse:
                yield c, [g for g in self.column(c) if g is not None]

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the task gradients within each group; float64 if any gradient is.

        Args:
            unshared: whether to add one more group, the unshared parameters.

        Returns:
            (S, T, T), or (S + 1, T, T).
        """
        S, T, arrangement = self.n_segments + unshared, self.n_tasks, self.arrangement
        counting = arrangement.columns if unshared else arrangement.shared
        parts = [self._products(b, S) for b in (arrangement.products_of_all if unshared else arrangement.products)]
        dtype = torch.float64 if any(c.dtype == torch.float64 for c in counting) else torch.float32
        if not parts:
            parts = [torch.zeros((S, T, T), dtype=dtype, device=self.device)]
        M = parts[0].to(dtype) if len(parts) == 1 else sum(parts[1:], parts[0]).to(dtype)
        mask = self.mask if self.products_masked else None
        for c in arrangement.sparse if unshared else [c for c in arrangement.sparse if c.segment is not None]:
            # One parameter at a time is dense, or has the rows that occur, while its dot products are computed.
            rows = TaskGrads(rows_that_occur(self.column(c)) if mask is None else self.dense(c), [0], 1)
            M[S - 1 if c.segment is None else c.segment] += operators.gramian_tensors(rows, mask_of([c.unit], mask))[0]
        return M if self.finite is None else torch.where(self.finite, M, torch.nan)

    def cross(self) -> Tensor:
        """Return the dot products within each group of the rows with those of the second batch, (S, T, T)."""
        assert self.second is not None, "the method needs it"
        S, T, arrangement = self.n_segments, self.n_tasks, self.arrangement
        mask = self.mask if self.products_masked else None
        dtype = torch.float64 if any(c.dtype == torch.float64 for c in arrangement.shared) else torch.float32
        M = torch.zeros((S, T, T), dtype=dtype, device=self.device)
        for batch in arrangement.products:
            rows = self.task_grads(batch, S)
            M += operators.cross_tensors(rows, batch.of(self.second), mask_of(batch.units, mask))
        for c in arrangement.sparse:
            others = [row[c.place] for row in self.second]
            if c.segment is not None and any(g is not None for g in others):
                rows = TaskGrads(self.dense(c), [0], 1)
                M[c.segment] += operators.cross_tensors(rows, others, mask_of([c.unit], mask))[0]
        return M

    def _products(self, batch: Batch, n_segments: int) -> Tensor:
        mask = self.mask if self.products_masked else None
        return operators.gramian_tensors(self.task_grads(batch, n_segments), mask_of(batch.units, mask))

    def task_grads(self, batch: Batch, n_segments: int) -> TaskGrads:
        """Return the gradients of a batch as operators take them; those of equal arguments are one object."""
        if (batch, n_segments) not in self._given:
            self._given[batch, n_segments] = TaskGrads(batch.of(self.grads), batch.segments, n_segments)
        return self._given[batch, n_segments]

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with Σ_t w[segment, t] g_t; an unshared one with Σ_t unshared_weights[t] g_t.

        A result overwrites one of its gradients if one is free. Without ``unshared_weights``, an unshared parameter
        that one task alone reaches gets that task's gradient itself.

        Args:
            w: (S, T), the weights of each group.
            unshared_weights: (T,), like ``w``; None for ones.
        """
        arrangement, results = self.arrangement, Results(self)
        if unshared_weights is None:
            results.take_own()
        batches = arrangement.sums if unshared_weights is None else arrangement.products_of_all
        if unshared_weights is not None:
            w = torch.cat((w, unshared_weights.unsqueeze(0)))
        elif arrangement.adds_up:
            w = torch.cat((w, torch.ones_like(w[:1])))
        kept = None if self.mask is None else self.mask.state.new_zeros(())
        for batch in batches:
            out, ws = results.memory(batch.columns), w.to(arithmetic_dtype(batch.dtype))
            mask = mask_of(batch.units, self.mask)
            operators.combine_tensors(self.task_grads(batch, len(w)), ws, out, mask, kept)
        self.release()
        for c in arrangement.sparse:
            if results.lacks(c):
                results.put(c, self._combine_sparse(c, w[-1 if c.segment is None else c.segment]))
        share = kept_share(kept, arrangement.columns) if kept is not None and batches else None
        return results.pairs(), share

    def release(self) -> None:
        """Forget all dense gradients, if nothing else will read them: results of embeddings take their place."""
        if not (self.compact and self.overwrite):
            return
        self._forget(lambda g: not g.is_sparse)

    def forget(self) -> None:
        """Forget all gradients: nothing will read them."""
        self._forget(lambda _: True)

    def _forget(self, which: Callable[[Tensor], bool]) -> None:
        self._given.clear()
        for row in self.grads:
            assert isinstance(row, list), "the step has made it"
            row[:] = [None if g is None or which(g) else g for g in row]

    def _combine_sparse(self, c: Column, w: Tensor) -> Tensor:
        dtype = arithmetic_dtype(c.dtype) if self.is_compact(c) else c.dtype
        combined = combine_sparse(self.column(c), w, self.params[c.place], dtype)
        if self.mask is not None and c.unit >= 0:
            drop_masked(combined, self.params[c.place], c.unit, self.mask)
        return combined


class Results:
    """The results of a combination, one for each column of some rows.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._results: list[Tensor | None] = [None] * rows.arrangement.n
        self._repeated: set[int] = set()
        if rows.overwrite:
            ids = [id(g) for row in rows.grads for g in row if g is not None]
            if len(set(ids)) < len(ids):
                self._repeated = {i for i, n in Counter(ids).items() if n > 1}

    def memory(self, columns: Sequence[Column]) -> list[Tensor]:
        """Return memory for the results of columns, laid out as new ``.grad``: a free gradient's, or new memory."""
        out = []
        for c in columns:
            free = self._free(c)
            g = new_grad(self._rows.params[c.place], c.dtype) if free is None else free
            self._results[c.place] = g
            out.append(g)
        return out

    def take_own(self) -> None:
        """Give the unshared parameters that one task alone reaches that task's gradient."""
        for c in self._rows.arrangement.own:
            assert c.own is not None
            g = self._rows.grads[c.own][c.place]
            assert g is not None
            is_free = self._rows.is_compact(c) or (not c.sparse and self._free(c) is not None)
            self.put(c, g if is_free else owned(g, self._rows.params[c.place]))

    def put(self, c: Column, g: Tensor) -> None:
        """Set the result of a column."""
        if self._rows.is_compact(c):
            g = added_up(g._indices()[0], g._values(), len(g)).to(c.dtype)
        self._results[c.place] = g

    def lacks(self, c: Column) -> bool:
        """Return whether the column has no result yet."""
        return self._results[c.place] is None

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its result, a complex one with a complex result."""
        for c in self._rows.arrangement.complex:
            g = self._results[c.place]
            if g is not None:
                self._results[c.place] = torch.view_as_complex(g)
        return [(p, g) for p, g in zip(self._rows.params, self._results, strict=True) if g is not None]

    def _free(self, c: Column) -> Tensor | None:
        """Return a gradient of a dense column that may be overwritten; None if all are needed elsewhere."""
        if not self._rows.overwrite:
            return None
        place, grads, repeated = c.place, self._rows.grads, self._repeated
        for t in c.tasks:
            g = grads[t][place]
            assert g is not None
            if owns_its_storage(g) and not (repeated and id(g) in repeated):
                return g
        return None


def gathered(grads: Row, numels: Sequence[int], index: Tensor) -> Tensor:
    """Return the entries at ``index`` as the operator ``gather`` does, of gradients of one or more dtypes."""
    by_dtype = [
        operators.gather([g if g is not None and g.dtype == dtype else None for g in grads], numels, index)
        for dtype in dict.fromkeys(g.dtype for g in grads if g is not None)
    ]
    return sum(by_dtype[1:], by_dtype[0])  # an entry has one dtype, and is 0 in the terms of the others


@lru_cache(maxsize=PLANS)
def eps_of(arrangement: Arrangement) -> tuple[float, ...] | None:
    """Return :attr:`Rows.eps`. Among the dtypes of one group the coarsest counts: it rounds the group's Gramian."""
    if len({arithmetic_dtype(c.dtype) for c in arrangement.columns}) < 2:  # and then the Gramian's dtype has it too
        return None
    finest = torch.finfo(torch.float64).eps
    of_groups = [finest] * arrangement.n_segments
    for c in arrangement.shared:
        assert c.segment is not None, "it is shared"
        of_groups[c.segment] = max(of_groups[c.segment], torch.finfo(arithmetic_dtype(c.dtype)).eps)
    return tuple(of_groups)
