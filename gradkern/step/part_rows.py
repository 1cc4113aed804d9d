"""The rows of a step with DTensors among its parameters: of each gradient the part that this rank holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.aggregators.history.averaged import Averaged
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import in_memory, mean_row
from gradkern.gradients.layouts import PLANS, Reach, Row, real_numel
from gradkern.gradients.losses import Losses, Source, losses_named
from gradkern.gradients.param_grads import as_real, new_grad, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement, Column
from gradkern.gradients.sharded import as_dtensor, is_dtensor, is_first_replica, n_replicas, start_here
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.step.begin import Start
from gradkern.step.gather import recalled, units_of, with_means
from gradkern.step.on_ranks import agreed_reach, refuse_sparse, refuse_switched, told
from gradkern.step.options import Options
from gradkern.step.rank_rows import RankRows
from gradkern.step.rows import Combined, Results, Rows, gathered, kept_share, mask_over
from gradkern.step.shard_rows import buckets_for, laid_like


class Piece(NamedTuple):
    """Neighbouring numbers of a part as they lie in memory: the parameter's place, the first, and the end."""

    place: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class PartRows(RankRows):
    """The parts of T rows that this rank holds. The Gramian is that of whole rows.

    ``params``, ``grads`` and ``arrangement`` are of the pieces of these parts. What several ranks hold counts once.

    Attributes:
        comm, targets: as for :class:`RankRows`.
        whole: as there; the columns' numbers of elements are those of the parts.
        pieces: the pieces, in the order of parameters. An empty part has none.
        replicas: for each parameter, the number of ranks that hold this part of it.
        starts: for each parameter, the position of this part in it; 0 if the step does not look at positions.
    """

    pieces: Sequence[Piece]
    replicas: Sequence[int]
    starts: Sequence[int]

    @property
    def of_params(self) -> Arrangement:
        """The columns of whole parameters, with their numbers of elements."""
        return _with_numels(self.whole, tuple(map(real_numel, self.targets.tensors)))

    def only(self, columns: Iterable[Column]) -> "PartRows":
        """Return the rows of some of the whole columns."""
        places = frozenset(c.place for c in columns)
        whole = _of_places(self.whole, places)
        pieces = frozenset(k for k, piece in enumerate(self.pieces) if piece.place in places)
        return replace(self, whole=whole, arrangement=_of_places(self.arrangement, pieces))

    def results(self) -> "PartResults":
        """Return what takes the results of the pieces."""
        return PartResults(self)

    def by_replicas(self) -> Iterator[tuple[int, Rows]]:
        """Yield each number of ranks that hold a part, and the rows of the parameters with so many."""
        for n in sorted({self.replicas[c.place] for c in self.whole.columns}):
            yield n, self.only(c for c in self.whole.columns if self.replicas[c.place] == n)

    def origin(self, c: Column) -> tuple[int, int, int]:
        """Return a piece's parameter, and where it begins in this rank's part of it, and in all of it."""
        place, first, _ = self.pieces[c.place]
        return place, first, self.starts[place] + first

    def share_of(self, kept: Sequence[tuple[int, Tensor]]) -> Tensor | None:
        """Return the share of whole parameters' entries that the mask kept; see :meth:`Rows.share_of`."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for n, count in kept:
            total += count / n
        return kept_share(self.comm.summed(total).round().long(), self.of_params.columns)

    def entries(self, columns: Sequence[Column], numels: Sequence[int], index: Tensor) -> Tensor:
        """Return some entries of whole rows, the same on all ranks; see :meth:`Rows.entries`."""
        dtypes = {arithmetic_dtype(c.dtype) for c in columns}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        X = torch.zeros((self.n_tasks, len(index)), dtype=dtype, device=self.device)
        runs: list[tuple[Piece | None, int]] = []
        for c, numel in zip(columns, numels, strict=True):
            at = 0
            for piece in self._held(c.place):
                first, last = self.starts[c.place] + piece.first, self.starts[c.place] + piece.last
                runs += [(None, first - at), (piece, last - first)]
                at = last
            runs.append((None, numel - at))
        runs = [run for run in runs if run[1]]
        numbers = {piece: k for k, piece in enumerate(self.pieces)}
        grads = [None if piece is None else row[numbers[piece]] for row in self.grads for piece, _ in runs]
        if any(g is not None for g in grads):
            X += gathered(grads, [n for _, n in runs], index)
        return self.comm.united(X)

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of whole rows, (S, T, T), the same bits on all ranks; see :meth:`Rows.gramian`."""
        assert not unshared, "the optimizer's own step is for one rank"
        return self._summed(lambda rows: Rows.gramian(rows, False))

    def cross(self) -> Tensor:
        """Return the dot products of whole rows with those of the second batch; see :meth:`Rows.cross`."""
        return self._summed(Rows.cross)

    def _summed(self, products: Callable[[Rows], Tensor]) -> Tensor:
        """Return the sum over all parts of their dot products, in which a part counts once."""
        in_float64 = any(c.dtype == torch.float64 for c in self.whole.shared or self.whole.columns)
        total = torch.zeros((self.n_segments, self.n_tasks, self.n_tasks), dtype=torch.float64, device=self.device)
        for n, rows in self.by_replicas():
            total += products(rows).double() / n
        M = self.comm.summed(total)
        return M if in_float64 else M.float()

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination, a DTensor with a DTensor; see :meth:`Rows.combine`."""
        ones = torch.ones_like(w[0]) if unshared_weights is None else unshared_weights.to(w.dtype)
        ws, results = torch.cat((w, ones.unsqueeze(0))), self.results()
        counts: list[tuple[int, Tensor]] = []
        for n, rows in self.by_replicas():
            kept = None if self.mask is None else self.mask.state.new_zeros(())
            for batch in rows.arrangement.products_of_all:
                grads, mask = rows.task_grads(batch, len(ws)), mask_over(batch.columns, self.mask)
                out = results.memory(batch.columns)
                operators.combine_tensors(grads, ws.to(arithmetic_dtype(batch.dtype)), out, mask, kept)
            if kept is not None:
                counts.append((n, kept))
        return results.pairs(), None if self.mask is None else self.share_of(counts)

    def _held(self, place: int) -> list[Piece]:
        """Return the pieces of a parameter, if this rank counts for it among those that hold them."""
        is_first = is_first_replica(self.targets.tensors[place], self.comm.rank)
        return [piece for piece in self.pieces if piece.place == place and is_first]


class PartResults(Results):
    """The results of a combination of parts: memory for each parameter's part, of which the columns are pieces.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: PartRows) -> None:
        self._parts = rows
        targets = rows.targets
        self._of_params = {c.place: new_grad(targets.here[c.place], c.dtype) for c in rows.whole.columns}

    def memory(self, columns: Sequence[Column]) -> list[Tensor]:
        """Return memory for the results of pieces."""
        pieces = [self._parts.pieces[c.place] for c in columns]
        return [_piece(self._of_params[piece.place], piece) for piece in pieces]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its result, a DTensor with a DTensor."""
        pairs = []
        for c in self._parts.whole.columns:
            p, g = self._parts.targets.tensors[c.place], self._of_params[c.place]
            pairs.append((p, as_dtensor(torch.view_as_complex(g) if c.complex else g, p)))
        return pairs


def part_rows(source: Source, options: Options, begun: Start) -> tuple[list[Row], PartRows]:
    """Return the parts of the step's gradients that this rank holds, T rows of n, and the rows that it combines.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, second = begun
    new, reach = _parts(source, begun)
    taken, shared = (new, None) if options.memory is None else recalled(present, targets, new, options.memory)
    if options.memory is not None:
        reach = tuple(map(targets.layouts.reach_of, taken))
    if isinstance(options.aggregator, Averaged):
        shared = with_means(options.aggregator, targets, shared or targets.are_shared(reach))
    whole = targets.arranged(reach, shared, units_of(options, targets))
    if not whole.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    suppression = options.suppression
    block = 1 if suppression is None else suppression.block
    starts = [start_here(p) or 0 if options.looks_at_positions else 0 for p in targets.tensors]
    arrangement, pieces = _cut(whole, tuple(starts), block)
    rows = PartRows(
        [_piece(as_real(targets.here[piece.place]), piece) for piece in pieces],
        _of_pieces(taken, pieces),
        arrangement,
        **told(source, options, begun, whole),
        pieces=pieces,
        replicas=[n_replicas(p, comm.size) for p in targets.tensors],
        starts=starts,
    )
    if second is None:
        return new, rows
    with losses_named("second"):
        return new, replace(rows, second=_of_pieces(_parts(second, begun)[0], pieces))


def _of_pieces(rows: Sequence[Row], pieces: Sequence[Piece]) -> list[Row]:
    return [[None if (g := row[piece.place]) is None else _piece(g, piece) for piece in pieces] for row in rows]


def _parts(source: Source, begun: Start) -> tuple[list[Row], Reach]:
    """Return this rank's parts of the means over the ranks of a source's gradients, T rows of n, and their layouts."""
    comm, targets, present, _, _ = begun
    own: list[Row] = [[None] * len(targets.tensors)] * len(present)
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own))
    return [_with_means(comm, targets, row, kinds) for row, kinds in zip(own, reach, strict=True)], reach


def _passes(source: Source, targets: Targets, own: list[Row]) -> list[tuple[bool, ...]]:
    """Run the backward passes, and put the gradients into ``own``; return which parameters each task reaches."""
    reached = [(False,) * len(own[0])] * len(own)
    # What a pass puts into ``.grad`` is nobody else's.
    passes = partial(source.passes, keep=False) if isinstance(source, Losses) else source.passes
    for t, grads in passes(targets.tensors):
        row = parts_of(grads, targets)
        refuse_sparse(t, row, targets)
        own[t], reached[t] = row, tuple([g is not None for g in row])
        del grads, row  # free them before the next task's pass
    refuse_switched(source, targets)
    return reached


def parts_of(grads: Row, targets: Targets) -> Row:
    """Return one task's gradients on this rank, each laid out as a new ``.grad`` of its parameter's part."""
    with torch.no_grad():
        return readable(grads, targets.here, targets.layouts)


def _with_means(comm: Comm, targets: Targets, row: Row, kinds: Sequence[object]) -> Row:
    """Return a row with means over the ranks in place of gradients of parameters that are no DTensors."""
    plain = [k for k, p in enumerate(targets.tensors) if kinds[k] is not None and not is_dtensor(p)]
    if not plain:
        return row
    means = mean_row(comm, buckets_for(plain, targets.layouts, comm, 1), row, targets.device)
    return [laid_like(k, means[k], targets) if k in means else g for k, g in enumerate(row)]


def _piece(x: Tensor, piece: Piece) -> Tensor:
    return in_memory(x.detach())[piece.first : piece.last]


@lru_cache(maxsize=PLANS)
def _cut(whole: Arrangement, starts: tuple[int, ...], block: int) -> tuple[Arrangement, list[Piece]]:
    """Return the columns of the parts' pieces, and the pieces: a part that starts within a block of a mask has two."""
    columns: list[Column] = []
    pieces: list[Piece] = []
    for c in whole.columns:
        start, is_masked = starts[c.place], c.unit >= 0
        within = min(-start % block, c.numel) if is_masked else 0
        for first, last in ((0, within), (within, c.numel)):
            if first < last:
                unit = c.unit + (start + first) // block if is_masked else -1
                columns.append(c._replace(place=len(columns), numel=last - first, unit=unit, complex=False))
                pieces.append(Piece(c.place, first, last))
    return Arrangement(columns, len(columns), whole.n_segments), pieces


@lru_cache(maxsize=PLANS)
def _of_places(arrangement: Arrangement, places: frozenset[int]) -> Arrangement:
    """Return the arrangement of the columns at some places."""
    return arrangement.of(c for c in arrangement.columns if c.place in places)


@lru_cache(maxsize=PLANS)
def _with_numels(arrangement: Arrangement, numels: tuple[int, ...]) -> Arrangement:
    """Return the arrangement with other numbers of elements."""
    return arrangement.of(c._replace(numel=numels[c.place]) for c in arrangement.columns)
