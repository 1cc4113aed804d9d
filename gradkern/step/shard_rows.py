"""The rows of a step on several ranks: this rank's shards of the means over all ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.distributed.buckets import Buckets, Piece, buckets_of
from gradkern.distributed.by_rows import like_rows
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import Reduction, in_memory, mean_row
from gradkern.gradients.layouts import PLANS, Layouts, Row
from gradkern.gradients.param_grads import as_real, new_grad
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement, Column
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.masked import kept_share, mask_over
from gradkern.step.rank_rows import RankRows
from gradkern.step.rows import Combined, Results, Rows, gathered


class Place(NamedTuple):
    """Neighbouring pieces of one group lie here: in which reduction, in which of its buckets, where in the shard."""

    reduction: int
    bucket: int
    at: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class ShardRows(RankRows):
    """The shards of T rows that this rank has. The Gramian is that of whole rows, and so are the results.

    ``params``, ``grads`` and ``arrangement`` are of the pieces in the shards. Parameters that are not under surgery are
    not in shards: each rank combines its own gradients of them, and the ranks' results are averaged.

    Attributes:
        comm, targets, whole: as for :class:`RankRows`.
        reductions: what the shards belong to.
        own: T rows of n gradients of this rank, of the parameters in no shard.
        unit: as for :func:`gradkern.distributed.buckets.buckets_of`.
        rows: the number of rows of each of the n parameters that the step leaves cut by rows, 0 for the others.
    """

    reductions: Sequence[Reduction]
    own: Sequence[Row]
    unit: int
    rows: Sequence[int]

    @property
    def of_params(self) -> Arrangement:
        """The columns of whole parameters, as for :class:`Rows`."""
        return self.whole

    def only(self, columns: Iterable[Column]) -> "ShardRows":
        """Return the rows of some of the whole columns."""
        return shard_rows(replace(self, whole=self.whole.of(columns)))

    def entries(self, columns: Sequence[Column], numels: Sequence[int], index: Tensor) -> Tensor:
        """Return some entries of whole rows, the same on all ranks; see :meth:`Rows.entries`."""
        runs = _runs(tuple(columns), tuple([r.buckets for r in self.reductions]), self.comm.rank)
        in_shard = [[self._run(run, t) for run in runs] for t in range(self.n_tasks)]
        dtypes = {arithmetic_dtype(c.dtype) for c in columns}
        X = torch.zeros(
            (self.n_tasks, len(index)),
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=self.device,
        )
        grads = [g for row in in_shard for g in row]
        if any(g is not None for g in grads):
            X += gathered(grads, [run.numel for run in runs], index)
        return self.comm.united(X)

    def results(self) -> Results:
        """Return what takes the results of whole parameters."""
        return Results(Rows(self.targets.tensors, (), self.whole))

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of whole rows, (S, T, T), the same bits on all ranks; see :meth:`Rows.gramian`."""
        assert not unshared, "unshared parameters are in no shard"
        in_float64 = any(c.dtype == torch.float64 for c in self.whole.shared or self.whole.columns)
        M = self.comm.summed(super().gramian(False))
        return M if in_float64 else M.float()

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination; see :meth:`Rows.combine`.

        Each is whole, but of a parameter that is cut by rows it is that of this rank's rows.
        """
        ones = torch.ones_like(w[0]) if unshared_weights is None else unshared_weights.to(w.dtype)
        ws, kept = torch.cat((w, ones.unsqueeze(0))), self._count()
        for batch in self.arrangement.products_of_all:
            rows, out = self.task_grads(batch, len(ws)), batch.of(self.grads[:1])  # over the first row
            mask = mask_over(batch.columns, self.mask)
            operators.combine_tensors(rows, ws.to(arithmetic_dtype(batch.dtype)), out, mask, kept)
        vectors: dict[int, Tensor] = {}
        reached = {c.place for c in self.whole.columns}
        for reduction in self.reductions:
            if not reached.isdisjoint(reduction.buckets.places):
                vectors |= reduction.combined()
        vectors |= self._means_of_own(w, unshared_weights)
        share = None if kept is None else kept_share(self.comm.summed(kept).long(), self.whole.columns)
        return results_of({c.place: vectors[c.place] for c in self.whole.columns}, self.targets), share

    def _run(self, run: "Place", t: int) -> Tensor | None:
        """Return the numbers of row ``t`` in a run; None if they are in other ranks' shards."""
        if run.reduction < 0:
            return None
        return self.reductions[run.reduction].shards[run.bucket][t, run.at : run.at + run.numel]

    def _count(self) -> Tensor | None:
        return None if self.mask is None else self.mask.state.new_zeros(())

    def _means_of_own(self, w: Tensor, unshared_weights: Tensor | None) -> dict[int, Tensor]:
        """Return the means over the ranks of the combined gradients that are in no shard, by their places."""
        sharded = {k for reduction in self.reductions for k in reduction.buckets.places}
        places = tuple([c.place for c in self.whole.columns if c.place not in sharded])
        if not places:
            return {}
        buckets = buckets_for(places, self.targets.layouts, self.comm, rows=self.rows)
        columns = [_of_tasks(_by_place(self.whole)[k], self.own) for k in places]
        arrangement = self.whole.of(c for c in columns if c.tasks)
        rows = Rows(self.targets.tensors, self.own, arrangement, overwrite=True)
        combined = dict(rows.combine(w, unshared_weights)[0]) if arrangement.columns else {}
        row = [None if (g := combined.get(p)) is None else as_real(g) for p in self.targets.tensors]
        return mean_row(self.comm, buckets, row, self.device)


def shard_rows(rows: ShardRows) -> ShardRows:
    """Return the rows with the pieces of their reductions' shards."""
    reductions, buckets = rows.reductions, tuple([r.buckets for r in rows.reductions])
    arrangement, places = _arranged(rows.whole, buckets, rows.comm.rank, rows.n_tasks, rows.unit)
    grads = [[reductions[i].shards[b][t, at : at + numel] for i, b, at, numel in places] for t in range(rows.n_tasks)]
    return replace(rows, params=grads[0], grads=grads, arrangement=arrangement)


def buckets_for(
    places: Sequence[int], layouts: Layouts, comm: Comm, unit: int = 1, rows: Sequence[int] | None = None
) -> Buckets:
    """Return the buckets of the parameters at ``places``; see :func:`gradkern.distributed.buckets.buckets_of`."""
    numels = tuple(layouts.numels)
    cut = (0,) * len(numels) if rows is None else tuple(rows)
    return buckets_of(tuple(places), numels, tuple(layouts.dtypes), cut, comm.size, unit)


def results_of(vectors: Mapping[int, Tensor], targets: Targets) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters at some places with their gradients, in the order of parameters.

    Each is in memory of its own, but this rank's rows of one are a view of their vector.
    """
    results = []
    for place in sorted(vectors):
        p, vector = targets.tensors[place], vectors[place]
        if vector.numel() < targets.layouts.numels[place]:
            results.append((p, like_rows(vector, p)))
        else:
            g = laid_like(place, vector, targets)
            results.append((p, torch.view_as_complex(g) if p.is_complex() else g))
    return results


def laid_like(place: int, vector: Tensor, targets: Targets) -> Tensor:
    """Return a copy of a gradient's numbers, laid out as a new ``.grad``; pairs of numbers for a complex parameter."""
    g = new_grad(targets.tensors[place], targets.layouts.dtypes[place])
    in_memory(g).copy_(vector)
    return g


@lru_cache(maxsize=PLANS)
def _arranged(
    whole: Arrangement, buckets: tuple[Buckets, ...], rank: int, T: int, unit: int
) -> tuple[Arrangement, list[Place]]:
    """Return the columns of a rank's pieces, and where they lie.

    Neighbouring pieces of one group are one column if no mask has to tell them apart. All tasks reach a column: a row
    is zeros where its task does not.
    """
    columns: list[Column] = []
    places: list[Place] = []
    of_params = _by_place(whole)
    for i, of_reduction in enumerate(buckets):
        for piece in of_reduction.pieces(rank):
            c = of_params.get(piece.place)
            if c is None:
                continue
            last = places[-1] if places else None
            if last is not None and last[:2] == (i, piece.bucket) and _are_alike(columns[-1], c):
                numel = piece.at + piece.numel - last.at
                places[-1], columns[-1] = last._replace(numel=numel), columns[-1]._replace(numel=numel)
            else:
                places.append(Place(i, piece.bucket, piece.at, piece.numel))
                columns.append(_column(len(columns), piece, c, T, unit))
    return Arrangement(columns, len(columns), whole.n_segments), places


@lru_cache(maxsize=PLANS)
def _runs(columns: tuple[Column, ...], buckets: tuple[Buckets, ...], rank: int) -> list[Place]:
    """Return where the numbers of whole columns lie, in order; ``reduction`` is -1 for those of other ranks' shards."""
    of_params: dict[int, tuple[int, Piece]] = {
        piece.place: (i, piece) for i, of_reduction in enumerate(buckets) for piece in of_reduction.pieces(rank)
    }
    runs: list[Place] = []
    for c in columns:
        i, piece = of_params.get(c.place, (-1, Piece(c.place, 0, 0, 0, 0)))
        end = piece.offset + piece.numel
        runs += [
            Place(-1, 0, 0, piece.offset),
            Place(i, piece.bucket, piece.at, piece.numel),
            Place(-1, 0, 0, c.numel - end),
        ]
    return [run for run in runs if run.numel]


def _are_alike(c: Column, other: Column) -> bool:
    return c.segment == other.segment and c.unit < 0 and other.unit < 0


def _column(number: int, piece: Piece, c: Column, T: int, unit: int) -> Column:
    first_unit = c.unit + piece.offset // unit if c.unit >= 0 else -1
    return Column(number, piece.numel, c.dtype, tuple(range(T)), c.segment, first_unit, False)


def _of_tasks(c: Column, rows: Sequence[Row]) -> Column:
    """Return an unshared column with the tasks whose gradients this rank has."""
    return c._replace(tasks=tuple(t for t, row in enumerate(rows) if row[c.place] is not None))


@lru_cache(maxsize=PLANS)
def _by_place(arrangement: Arrangement) -> dict[int, Column]:
    return {c.place: c for c in arrangement.columns}
