"""The matrices of a small model's groups, and how they are put together from the tasks' gradients.

Each task has one vector, the gradients of the parameters that it reaches, in the order of the parameters. A run is a
sequence of neighbouring parameters that are in the same group and are reached by the same tasks. A task's vector is cut
into pieces, one for each run that it reaches. A group's matrix, its block, has a row for each task: the pieces of the
group's runs, with zeros in place of the runs that the task does not reach. For two tasks, a shared trunk and two heads:

    task 0's vector    trunk 0 | head 0                  block    trunk 0
    task 1's vector    trunk 1 | head 1                           trunk 1
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from gradkern.gradients.layouts import PLANS
from gradkern.gradients.plan import Arrangement, Column
from gradkern.ops.pytorch.chunks import LINE, even_width

ALIGNED = LINE // 2
"""Blocks start at multiples of so many elements, and so of a cache line for elements of 2 bytes and more."""

Pieces = Sequence[Sequence[Tensor]]
"""Each task's gradients, in a vector for each run that it reaches."""


class Run:
    """Neighbouring parameters of one group that the same tasks reach.

    Attributes:
        columns: the parameters' columns.
        segment: their group; None for unshared ones.
        numel: the number of elements of all.
        pieces: for each task that reaches the run, the index of its piece in that task's vector.
    """

    def __init__(self, columns: Sequence[Column], segment: int | None) -> None:
        self.columns = columns
        self.segment = segment
        self.numel = sum(c.numel for c in columns)
        self.pieces: dict[int, int] = {}


class Part(NamedTuple):
    """A part of a block's memory: a task's piece, by its index, or zeros where that is None."""

    task: int
    piece: int | None
    numel: int


class Blocks:
    """The matrices of S groups, with a row for each task. They follow each other in memory.

    Rows are padded with zeros to a whole number of chunks, and blocks so that the next one starts at a cache line.
    Without the padding the Gramian takes longer.

    Args:
        groups: the runs of each group.
        T: the number of tasks.

    Attributes:
        places: the numbers of each block's parameters.
    """

    def __init__(self, groups: Sequence[Sequence[Run]], T: int) -> None:
        self._parts: list[Part] = []
        self._shapes: list[tuple[int, int]] = []
        self._sizes: list[int] = []
        self.places = [[c.place for run in runs for c in run.columns] for runs in groups]
        for s, runs in enumerate(groups):
            numel = sum(run.numel for run in runs)
            width = even_width(T, numel)
            for t in range(T):
                self._parts += [Part(t, run.pieces.get(t), run.numel) for run in runs]
                self._parts.append(Part(t, None, width - numel))
            gap = -T * width % ALIGNED if s < len(groups) - 1 else 0
            self._parts.append(Part(0, None, gap))
            self._shapes.append((T, width))
            self._sizes += [T * width, gap]
        self._parts = [part for part in self._parts if part.numel]
        self._longest_gap = max((part.numel for part in self._parts if part.piece is None), default=0)

    def of(self, pieces: Pieces, like: Tensor) -> list[Tensor]:
        """Return S matrices (T, width), with zeros where a task does not reach a run; of the dtype of ``like``."""
        zeros = like.new_zeros(self._longest_gap) if self._longest_gap else like
        memory = torch.cat(
            [
                pieces[t][piece] if piece is not None else zeros if numel == self._longest_gap else zeros[:numel]
                for t, piece, numel in self._parts
            ]
            or [like.new_empty(0)]
        )
        if len(self._shapes) == 1:
            return [memory.view(self._shapes[0])]
        blocks = memory.split_with_sizes(self._sizes)[::2]
        return [block.view(shape) for block, shape in zip(blocks, self._shapes, strict=True)]

    def results(self, combinations: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' parts of the S matrices' combinations, as views."""
        return _views(combinations, self.places, params)


def _views(vectors: Iterable[Tensor], places: Iterable[Sequence[int]], params: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of vectors that belong to the parameters at ``places``, shaped like them."""
    parts: list[Tensor] = []
    for vector, of_vector in zip(vectors, places, strict=True):
        parts += _unflatten_dense_tensors(vector, [params[k] for k in of_vector])
    return parts


class Own:
    """The gradients of unshared parameters, each of which one task alone reaches.

    Args:
        runs: the runs, each reached by one task.

    Attributes:
        places: the numbers of each run's parameters.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._pieces = [(t, piece) for run in runs for t, piece in run.pieces.items()]
        self.places = [[c.place for c in run.columns] for run in runs]

    def results(self, pieces: Pieces, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters' gradients, as views."""
        return _views([pieces[t][piece] for t, piece in self._pieces], self.places, params)


class Plan:
    """The blocks of an arrangement.

    Attributes:
        lengths: the lengths of each task's pieces.
        shared: the blocks of the S groups.
        unshared: the block of unshared parameters; None if there are none.
        own: the gradients of unshared parameters; None if several tasks reach one of them.
        places: the numbers of all parameters, in ascending order.
        order: the position of each one's result among the results of ``shared`` and of ``unshared`` or ``own``; None if
            they are in order.
    """

    def __init__(self, arrangement: Arrangement, T: int) -> None:
        self.lengths: list[list[int]] = [[] for _ in range(T)]
        groups: list[list[Run]] = [[] for _ in range(arrangement.n_segments)]
        unshared: list[Run] = []
        for (segment, tasks), columns in groupby(arrangement.columns, lambda c: (c.segment, c.tasks)):
            run = Run(list(columns), segment)
            for t in tasks:
                run.pieces[t] = len(self.lengths[t])
                self.lengths[t].append(run.numel)
            (unshared if segment is None else groups[segment]).append(run)
        self.shared = Blocks(groups, T)
        self.unshared = Blocks([unshared], T) if unshared else None
        self.own = None if arrangement.adds_up else Own(unshared)
        places = [k for blocks in (self.shared, self.unshared) if blocks for of_one in blocks.places for k in of_one]
        self.places = sorted(places)
        self.order = None if places == self.places else sorted(range(len(places)), key=places.__getitem__)


plan = lru_cache(maxsize=PLANS)(Plan)
