"""The rows of a small model's step: all task gradients in one matrix.

In a small model the time goes into calls, a few for each tensor and task. So the gradients of a task are copied into
one vector after its backward pass, in one call, and then nothing needs to know how autograd laid them out, or who else
refers to them. The vectors make a matrix, whose Gramian and combination are one call each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradkern.gradients.param_grads import reach_of
from gradkern.gradients.plan import PLANS, Arrangement, Column, Layouts, Row
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.registry import is_watched
from gradkern.step.rows import Combined, Rows

LARGEST = 1 << 19
"""The number of elements of all task gradients up to which a copy takes less time than the calls that it saves."""


def fits(layouts: Layouts, n_tasks: int) -> bool:
    """Return whether the rows of a step may be a matrix.

    Parameters have one dtype, are contiguous and small, and on a device that the PyTorch back end serves: a GPU's own
    back end takes six launches for any number of tensors, and copies would be T + 1 more. A step that is traced is
    traced as it runs there.
    """
    plain = layouts.one_dtype and layouts.contiguous and n_tasks * layouts.numel <= LARGEST
    return plain and layouts.device.type not in operators.gramian_tensors.implementations and not is_watched()


class Flat(NamedTuple):
    """The gradients of one task, one after another in one vector, and the layouts that autograd gave them."""

    vector: Tensor
    reach: tuple[torch.layout | None, ...]

    def views(self, params: Sequence[Tensor]) -> Row:
        """Return the gradients as views of the vector."""
        reached = [p.numel() for p, kind in zip(params, self.reach, strict=True) if kind is not None]
        pieces = iter(self.vector.split(reached))
        return [None if kind is None else next(pieces).view_as(p) for p, kind in zip(params, self.reach, strict=True)]


def flattened(row: Row, layouts: Layouts) -> Flat | None:
    """Return a copy of the gradients in one vector; None if one is sparse, or not of the parameters' dtype."""
    reach = reach_of(row)
    if not _DENSE.issuperset(reach):
        return None
    present = [g for g in row if g is not None]
    if not present:
        return None
    # Of a single tensor torch would return a view.
    vector = _flatten_dense_tensors(present) if len(present) > 1 else present[0].flatten().clone()
    return Flat(vector, reach) if vector.dtype == layouts.dtypes[0] else None


_DENSE = frozenset((torch.strided, None))


class _Run(NamedTuple):
    """Neighbouring columns of one group that the same tasks reach."""

    columns: tuple[Column, ...]
    segment: int | None
    tasks: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements of all columns."""
        return sum(c.numel for c in self.columns)


Pieces = Sequence[Sequence[Tensor]]
"""Each task's gradients, in a vector for each run that it reaches."""


class _Matrix:
    """A matrix of some runs' gradients, a row for each task.

    Args:
        runs: the runs, those of a group next to each other.
        of_task: for each task the runs that it reaches, in the order of its pieces.
        n_segments: the number of groups.

    Attributes:
        columns: the runs' columns.
        numels: the number of elements of each.
    """

    def __init__(self, runs: Sequence[_Run], of_task: Sequence[Sequence[_Run]], n_segments: int) -> None:
        self.columns = [c for run in runs for c in run.columns]
        self.numels = [c.numel for c in self.columns]
        self._bounds = _bounds(runs, n_segments)
        self._shape = (len(of_task), sum(self.numels))
        self._gaps = [run.numel for run in runs]
        self._places = [[mine.index(run) if run in mine else None for run in runs] for mine in of_task]
        self._owners = [(run.tasks[0], of_task[run.tasks[0]].index(run)) for run in runs]
        self.is_own = all(len(run.tasks) == 1 for run in runs)
        """Whether each run belongs to one task alone."""

    def of(self, pieces: Pieces) -> Tensor:
        """Return the matrix, (T, width), with zeros where a task does not reach a run."""
        if not self.columns:
            return next(x for some in pieces for x in some).new_empty(self._shape)
        parts: list[Tensor] = []
        zeros: Tensor | None = None
        for mine, places in zip(pieces, self._places, strict=True):
            for place, gap in zip(places, self._gaps, strict=True):
                if place is not None:
                    parts.append(mine[place])
                    continue
                if zeros is None:
                    zeros = next(x for some in pieces for x in some).new_zeros(max(self._gaps))
                parts.append(zeros[:gap])
        return torch.cat(parts).view(self._shape)

    def offsets(self) -> Tensor | None:
        """Return the bounds of the groups, as for :func:`gradkern.gramian`; None for a single group."""
        return torch.tensor(self._bounds, device="cpu") if len(self._bounds) > 2 else None

    def own(self, pieces: Pieces) -> Tensor:
        """Return the gradients of runs that belong to one task each, (width,)."""
        return torch.cat([pieces[t][place] for t, place in self._owners])


def _bounds(runs: Sequence[_Run], n_segments: int) -> list[int]:
    widths = [0] * n_segments
    for run in runs:
        widths[run.segment or 0] += run.numel
    return [0, *accumulate(widths)]


class _Matrices:
    """The matrices of an arrangement: of shared and of unshared parameters."""

    def __init__(self, arrangement: Arrangement, n_tasks: int) -> None:
        grouped = groupby(arrangement.columns, lambda c: (c.segment, c.tasks))
        runs = [_Run(tuple(columns), segment, tasks) for (segment, tasks), columns in grouped]
        of_task = [[run for run in runs if t in run.tasks] for t in range(n_tasks)]
        self.lengths = [[run.numel for run in mine] for mine in of_task]
        shared = sorted((run for run in runs if run.segment is not None), key=lambda run: run.segment or 0)
        self.shared = _Matrix(shared, of_task, arrangement.n_segments)
        self.unshared = _Matrix([run for run in runs if run.segment is None], of_task, 1)


_matrices = lru_cache(maxsize=PLANS)(_Matrices)


@dataclass(frozen=True)
class FlatRows:
    """The T task gradients of a step as vectors.

    Attributes:
        params: n parameters.
        vectors: the gradients of each task, as :func:`flattened` returns them; None for an absent task.
        arrangement: the columns of the gradients.
        losses: as for :class:`gradkern.step.rows.Rows`.
    """

    params: Sequence[Tensor]
    vectors: Sequence[Tensor | None]
    arrangement: Arrangement
    losses: Tensor | None = None

    mask = None
    present = None

    @property
    def n_tasks(self) -> int:
        """The number of tasks, T."""
        return len(self.vectors)

    @property
    def n_segments(self) -> int:
        """The number of groups, S."""
        return self.arrangement.n_segments

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.params[0].device

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of the task gradients within each group; see :meth:`Rows.gramian`."""
        matrices = self._matrices
        M = operators.gramian(self._J, matrices.shared.offsets()).view(-1, self.n_tasks, self.n_tasks)
        if not unshared:
            return M
        return torch.cat((M, operators.gramian(matrices.unshared.of(self._pieces)).unsqueeze(0)))

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination; see :meth:`Rows.combine`."""
        shared, unshared = self._matrices.shared, self._matrices.unshared
        weights = w.to(arithmetic_dtype(self._J.dtype))
        offsets = shared.offsets()
        of_groups = weights[0] if offsets is None else weights
        results: list[Tensor | None] = [None] * len(self.params)
        self._put(operators.combine(self._J, of_groups, offsets), shared, results)
        if unshared.columns:
            if unshared_weights is None and unshared.is_own:
                g = unshared.own(self._pieces)
            else:
                ones = torch.ones_like(weights[0])
                of_unshared = ones if unshared_weights is None else unshared_weights.to(ones.dtype)
                g = operators.combine(unshared.of(self._pieces), of_unshared, None)
            self._put(g, unshared, results)
        return [(p, g) for p, g in zip(self.params, results, strict=True) if g is not None], None

    def _put(self, g: Tensor, matrix: _Matrix, results: list[Tensor | None]) -> None:
        """Put the parts of a result where the parameters are, each in memory of its own."""
        params = [self.params[c.place] for c in matrix.columns]
        parts = [x if p.ndim == 1 else x.view_as(p) for x, p in zip(g.split(matrix.numels), params, strict=True)]
        for c, part in zip(matrix.columns, _clones(parts), strict=True):
            results[c.place] = part

    @cached_property
    def _matrices(self) -> _Matrices:
        return _matrices(self.arrangement, self.n_tasks)

    @cached_property
    def _pieces(self) -> Pieces:
        return [
            () if vector is None else vector.split(lengths) if len(lengths) > 1 else (vector,)
            for vector, lengths in zip(self.vectors, self._matrices.lengths, strict=True)
        ]

    @cached_property
    def _J(self) -> Tensor:
        return self._matrices.shared.of(self._pieces)


StepRows = Rows | FlatRows
"""The rows of a step."""


def _clones(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_clone(tensors) if _HAS_FOREACH_CLONE and tensors else [x.clone() for x in tensors]


_HAS_FOREACH_CLONE = hasattr(torch, "_foreach_clone")  # private API of PyTorch, which may lack it
