"""The rows of a step with DTensors among its parameters: of each gradient the part that this rank holds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradkern.distributed.reduction import in_memory
from gradkern.gradients.layouts import PLANS, Row, real_numel
from gradkern.gradients.param_grads import as_real, new_grad
from gradkern.gradients.plan import Arrangement, Column
from gradkern.gradients.sharded import Box, as_dtensor, is_first_replica
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.philox import dropped_at
from gradkern.step.located import located
from gradkern.step.masked import kept_share, mask_over
from gradkern.step.rank_rows import RankRows
from gradkern.step.rows import Combined, Results, Rows, gathered


class Piece(NamedTuple):
    """Neighbouring numbers of a part as they lie in memory.

    Attributes:
        place: the parameter's place.
        first: the position of the first number in the part.
        last: the position behind the last one.
        before: how many zeros stand before them, so that they begin where random numbers do.
    """

    place: int
    first: int
    last: int
    before: int


@dataclass(frozen=True, kw_only=True)
class PartRows(RankRows):
    """The parts of T rows that this rank holds. The Gramian is that of whole rows.

    ``params``, ``grads`` and ``arrangement`` are of the pieces of these parts. What several ranks hold counts once.

    Attributes:
        comm, targets: as for :class:`RankRows`.
        whole: as there; the columns' numbers of elements are those of the parts.
        parts: T rows of n parts of gradients.
        pieces: the pieces, in the order of parameters. An empty part has none.
        replicas: for each parameter, the number of ranks that hold this part of it.
        boxes: for each parameter, where this part lies in it; none if the step does not look at positions.
        align: the number of elements at whose multiples pieces of shared parameters begin.
    """

    parts: Sequence[Row]
    pieces: Sequence[Piece] = ()
    replicas: Sequence[int]
    boxes: Sequence[Box]
    align: int

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

    def uncut(self) -> Rows:
        """Return the parts as they are."""
        return Rows(self.targets.here, self.parts, self.whole)

    def results(self) -> "PartResults":
        """Return what takes the results of the pieces."""
        return PartResults(self)

    def by_replicas(self) -> Iterator[tuple[int, Rows]]:
        """Yield each number of ranks that hold a part, and the rows of the parameters with so many."""
        for n in sorted({self.replicas[c.place] for c in self.whole.columns}):
            yield n, self.only(c for c in self.whole.columns if self.replicas[c.place] == n)

    def origin(self, c: Column) -> tuple[int, int]:
        """Return the place of a piece's parameter, and where the piece begins in the whole parameter."""
        piece = self.pieces[c.place]
        return piece.place, self.starts[piece.place] + piece.first - piece.before

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """For each parameter, the position of this part in it; 0 if the step does not look at positions."""
        return tuple([box.start or 0 for box in self.boxes]) or (0,) * len(self.targets.tensors)

    def share_of(self, kept: Sequence[tuple[int, Tensor]]) -> Tensor | None:
        """Return the share of whole parameters' entries that the mask kept; see :meth:`Rows.share_of`."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for n, count in kept:
            total += count / n
        for c in self.arrangement.columns:
            place, _, _, before = self.pieces[c.place]
            if before and c.unit >= 0 and self.mask is not None:
                units = c.unit + torch.arange(before, device=self.device) // self.mask.block
                total -= (before - dropped_at(units, self.mask.state).count_nonzero()) / self.replicas[place]
        return kept_share(self.comm.summed(total).round().long(), self.of_params.columns)

    def entries(self, columns: Sequence[Column], numels: Sequence[int], index: Tensor) -> Tensor:
        """Return some entries of whole rows, the same on all ranks; see :meth:`Rows.entries`."""
        dtypes = {arithmetic_dtype(c.dtype) for c in columns}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        X = torch.zeros((self.n_tasks, len(index)), dtype=dtype, device=self.device)
        boxes = tuple([self._box(c.place) for c in columns])
        held = [(c.place, prod(box.sizes)) for c, box in zip(columns, boxes, strict=True) if prod(box.sizes)]
        grads = [None if (g := row[k]) is None else in_memory(g) for row in self.parts for k, _ in held]
        if any(g is not None for g in grads):
            at, is_held = located(index, boxes)
            X += gathered(grads, [n for _, n in held], at).masked_fill(~is_held, 0.0)
        return self.comm.united(X)

    def _box(self, place: int) -> Box:
        """Return where a part lies, an empty one if another rank counts for it among those that hold it."""
        box = self.boxes[place]
        if is_first_replica(self.targets.tensors[place], self.comm.rank, self.comm.ranks[0]):
            return box
        return box._replace(sizes=(0,) * len(box.sizes))

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


class PartResults(Results):
    """The results of a combination of parts: memory for each parameter's part, of which the columns are pieces.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: PartRows) -> None:
        self._parts = rows
        targets = rows.targets
        self._of_params = {c.place: new_grad(targets.here[c.place], c.dtype) for c in rows.whole.columns}
        self._aside: list[tuple[Tensor, Tensor]] = []

    def memory(self, columns: Sequence[Column]) -> list[Tensor]:
        """Return memory for the results of pieces, and of the zeros before them."""
        out = []
        for c in columns:
            place, first, last, before = self._parts.pieces[c.place]
            result = in_memory(self._of_params[place])[first:last]
            if before:
                aside = result.new_empty(before + len(result))
                self._aside.append((result, aside[before:]))
                result = aside
            out.append(result)
        return out

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its result, a DTensor with a DTensor."""
        for result, aside in self._aside:
            result.copy_(aside)
        pairs = []
        for c in self._parts.whole.columns:
            p, g = self._parts.targets.tensors[c.place], self._of_params[c.place]
            pairs.append((p, as_dtensor(torch.view_as_complex(g) if c.complex else g, p)))
        return pairs


def cut(rows: PartRows) -> PartRows:
    """Return the rows with the pieces of their parts."""
    block = 1 if rows.mask is None else rows.mask.block
    arrangement, pieces = _cut(rows.whole, rows.starts, block, rows.align)
    params = [_piece(as_real(rows.targets.here[piece.place]), piece) for piece in pieces]
    return replace(rows, params=params, grads=of_pieces(rows.parts, pieces), arrangement=arrangement, pieces=pieces)


def of_pieces(parts: Sequence[Row], pieces: Sequence[Piece]) -> list[Row]:
    """Return the pieces of T rows of parts."""
    return [[None if (g := row[piece.place]) is None else _piece(g, piece) for piece in pieces] for row in parts]


def _piece(x: Tensor, piece: Piece) -> Tensor:
    numbers = in_memory(x.detach())[piece.first : piece.last]
    return pad(numbers, (piece.before, 0)) if piece.before else numbers


@lru_cache(maxsize=PLANS)
def _cut(whole: Arrangement, starts: tuple[int, ...], block: int, align: int) -> tuple[Arrangement, list[Piece]]:
    """Return the columns of the parts' pieces, and the pieces.

    A part of a shared parameter has two pieces if it begins between multiples of ``align``, where random numbers do.
    """
    columns: list[Column] = []
    pieces: list[Piece] = []
    for c in whole.columns:
        start = starts[c.place]
        before = 0 if c.segment is None else start % align
        within = min(align - before, c.numel) if before else 0
        for first, last, zeros in ((0, within, before), (within, c.numel, 0)):
            if first < last:
                unit = c.unit + (start + first - zeros) // block if c.unit >= 0 else -1
                numel = zeros + last - first
                columns.append(c._replace(place=len(columns), numel=numel, unit=unit, complex=False))
                pieces.append(Piece(c.place, first, last, zeros))
    return Arrangement(columns, len(columns), whole.n_segments), pieces


@lru_cache(maxsize=PLANS)
def _of_places(arrangement: Arrangement, places: frozenset[int]) -> Arrangement:
    """Return the arrangement of the columns at some places."""
    return arrangement.of(c for c in arrangement.columns if c.place in places)


@lru_cache(maxsize=PLANS)
def _with_numels(arrangement: Arrangement, numels: tuple[int, ...]) -> Arrangement:
    """Return the arrangement with other numbers of elements."""
    return arrangement.of(c._replace(numel=numels[c.place]) for c in arrangement.columns)
