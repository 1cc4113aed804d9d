"""The matrices of a small model's groups: which parts of the task gradients they consist of, and where results go."""

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


class Run(NamedTuple):
    """Neighbouring columns of one group that the same tasks reach."""

    columns: tuple[Column, ...]
    segment: int | None
    tasks: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements of all columns."""
        return sum(c.numel for c in self.columns)


class Part(NamedTuple):
    """A part of a block's memory: the piece of a task, or zeros if there is none."""

    task: int
    piece: int | None
    numel: int


class Blocks:
    """The matrices of S groups, with a row for each task. They follow each other in memory.

    A row ends with zeros where the columns could otherwise not be cut into equal chunks, and a block with some where
    the next would not start at a cache line. The Gramian of other blocks takes longer.

    Args:
        groups: the runs of each group.
        of_task: for each of T tasks the runs that it reaches, in the order of its pieces.
    """

    def __init__(self, groups: Sequence[Sequence[Run]], of_task: Sequence[Sequence[Run]]) -> None:
        T = len(of_task)
        self._parts: list[Part] = []
        self._shapes: list[tuple[int, int]] = []
        self._sizes: list[int] = []
        self._places: list[int | None] = []
        self._numels: list[int] = []
        for runs in groups:
            columns = [c for run in runs for c in run.columns]
            numel = sum(c.numel for c in columns)
            width = even_width(T, numel)
            for t, mine in enumerate(of_task):
                self._parts += [Part(t, mine.index(run) if run in mine else None, run.numel) for run in runs]
                self._parts.append(Part(t, None, width - numel))
            gap = -T * width % ALIGNED if runs is not groups[-1] else 0
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
        of_task: as for :class:`Blocks`.
    """

    def __init__(self, runs: Sequence[Run], of_task: Sequence[Sequence[Run]]) -> None:
        self._runs = [
            (
                run.tasks[0],
                of_task[run.tasks[0]].index(run),
                [c.place for c in run.columns],
                [c.numel for c in run.columns],
            )
            for run in runs
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

    def __init__(self, arrangement: Arrangement, n_tasks: int) -> None:
        grouped = groupby(arrangement.columns, lambda c: (c.segment, c.tasks))
        runs = [Run(tuple(columns), segment, tasks) for (segment, tasks), columns in grouped]
        of_task = [[run for run in runs if t in run.tasks] for t in range(n_tasks)]
        self.lengths = [[run.numel for run in mine] for mine in of_task]
        groups = [[run for run in runs if run.segment == s] for s in range(arrangement.n_segments)]
        self.shared = Blocks(groups, of_task)
        unshared = [run for run in runs if run.segment is None]
        self.unshared = Blocks([unshared], of_task) if unshared else None
        self.own = None if arrangement.adds_up else Own(unshared, of_task)


plan = lru_cache(maxsize=PLANS)(Plan)
