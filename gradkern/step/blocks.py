"""The matrices of a small model's groups, and how they are put together from the tasks' gradients.

Each task has one vector, the gradients of the parameters that it reaches, in the order of the parameters. A run is a
sequence of neighbouring parameters that are in the same group and are reached by the same tasks. A task's vector is cut
into pieces, one for each run that it reaches. A group's matrix, its block, has a row for each task: the pieces of the
group's runs, with zeros in place of the runs that the task does not reach. For two tasks, a shared trunk and two heads:

    task 0's vector    trunk 0 | head 0                  block    trunk 0
    task 1's vector    trunk 1 | head 1                           trunk 1
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.gradients.plan import PLANS, Arrangement, Column
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
    """

    def __init__(self, groups: Sequence[Sequence[Run]], T: int) -> None:
        self._parts: list[Part] = []
        self._shapes: list[tuple[int, int]] = []
        self._sizes: list[int] = []
        self._places: list[int | None] = []
        self._numels: list[int] = []
        for s, runs in enumerate(groups):
            columns = [c for run in runs for c in run.columns]
            numel = sum(c.numel for c in columns)
            width = even_width(T, numel)
            for t in range(T):
                self._parts += [Part(t, run.pieces.get(t), run.numel) for run in runs]
                self._parts.append(Part(t, None, width - numel))
            gap = -T * width % ALIGNED if s < len(groups) - 1 else 0
            self._parts.append(Part(0, None, gap))
            self._shapes.append((T, width))
            self._sizes += [T * width, gap]
            self._places += [*(c.place for c in columns), None]
            self._numels += [*(c.numel for c in columns), width - numel]
        self._parts = [part for part in self._parts if part.numel]
        self._longest_gap = max((part.numel for part in self._parts if part.piece is None), default=0)

    def of(self, pieces: Pieces) -> list[Tensor]:
        """Return S matrices (T, width), with zeros where a task does not reach a run."""
        like = next(x for mine in pieces for x in mine)
        zeros = like.new_zeros(self._longest_gap) if self._longest_gap else like
        memory = torch.cat(
            [
                pieces[t][piece] if piece is not None else zeros if numel == self._longest_gap else zeros[:numel]
                for t, piece, numel in self._parts
            ]
            or [like.new_empty(0)]
        )
        blocks = memory.split_with_sizes(self._sizes)[::2] if len(self._shapes) > 1 else (memory,)
        return [block.view(shape) for block, shape in zip(blocks, self._shapes, strict=True)]

    def results(self, combinations: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Return the number of each parameter and its part of the S matrices' combinations."""
        g = combinations[0] if len(combinations) == 1 else torch.cat(list(combinations))
        parts = zip(self._places, g.split_with_sizes(self._numels), strict=True)
        return [(place, part) for place, part in parts if place is not None]


class Own:
    """The gradients of unshared parameters that one task alone reaches.

    Args:
        runs: the runs.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = [
            (t, piece, [c.place for c in run.columns], [c.numel for c in run.columns])
            for run in runs
            for t, piece in run.pieces.items()
        ]

    def results(self, pieces: Pieces) -> list[tuple[int, Tensor]]:
        """Return the number of each parameter and its gradient."""
        parts: list[tuple[int, Tensor]] = []
        for t, piece, places, numels in self._runs:
            parts += zip(places, pieces[t][piece].split_with_sizes(numels), strict=True)
        return parts


class Plan:
    """The blocks of an arrangement.

    Attributes:
        lengths: the lengths of each task's pieces.
        shared: the blocks of the S groups.
        unshared: the block of unshared parameters; None if there are none.
        own: the gradients of unshared parameters; None if several tasks reach one of them.
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


plan = lru_cache(maxsize=PLANS)(Plan)
