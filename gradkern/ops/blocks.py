"""The rows of J a block of columns at a time, converted or gathered into memory that each block overwrites.

A block stays in cache until it has been worked on, so that the conversion and the gathering cost no memory traffic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.ops.schema import arithmetic_dtype

BLOCK = 1 << 19
"""Numbers of a block, all rows together: 2 MB of float32, what a core's second cache holds. Half or twice as many took
a tenth longer."""

Erase = Callable[[int, int, Tensor], None]
"""Given a tensor's number, and from which entry on a matrix holds its rows: put 0 for those that do not count."""
Columns = Mapping[int, Sequence[Tensor | None]]
"""By its number, the T gradients of a tensor, each of one dimension."""


def flat(g: Tensor) -> Tensor:
    """A dense tensor as the memory it is."""
    return g.flatten() if g.is_contiguous() else g.as_strided((g.numel(),), (1,))


def widened(J: Tensor) -> Tensor:
    """J in arithmetic dtype, where all of it then fits into a block; else J."""
    wanted = arithmetic_dtype(J.dtype)
    return J if J.dtype == wanted or J.numel() > BLOCK else J.to(wanted)


def converted(J: Tensor, dtype: torch.dtype, step: int) -> Iterator[Tensor]:
    """Blocks of ``step`` columns of J, the last one narrower, in ``dtype``."""
    T, P = J.shape
    scratch = J.new_empty((T, min(step, P)), dtype=dtype)
    for a in range(0, max(P, 1), step):
        columns = J[:, a : a + step]
        yield scratch[:, : columns.shape[1]].copy_(columns)


class Scratch:
    """Memory that each block overwrites, grown to the largest of them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._stored = like.new_empty(0)
        self._converted = self._stored.to(dtype)

    def joined(self, parts: list[Tensor], count: int) -> Tensor:
        """``parts``, ``count`` numbers in all, one after another."""
        if len(self._stored) < count:
            self._stored = self._stored.new_empty(count)
        stored = torch.cat(parts, out=self._stored[:count])
        if stored.dtype == self._converted.dtype:
            return stored
        if len(self._converted) < count:
            self._converted = self._converted.new_empty(count)
        return self._converted[:count].copy_(stored)


class _Piece(NamedTuple):
    """Neighbouring entries of a tensor."""

    k: int
    column: Sequence[Tensor | None]
    start: int
    length: int
    whole: bool

    def of(self, g: Tensor) -> Tensor:
        """The piece of one gradient; a whole tensor is not sliced, which takes as long as copying a bias."""
        return g if self.whole else g[self.start : self.start + self.length]


def gathered(columns: Columns, scratch: Scratch, step: int, erase: Erase | None) -> Iterator[Tensor]:
    """Blocks of ``step`` columns, the last one narrower, of the rows that tensors form one after another."""
    zeros = next(g for column in columns.values() for g in column if g is not None).new_empty(0)
    pieces: list[_Piece] = []
    room = step
    for k, column in columns.items():
        done, numel = 0, next(len(g) for g in column if g is not None)
        if len(zeros) < min(step, numel) and any(g is None for g in column):
            zeros = zeros.new_zeros(min(step, numel))
        while done < numel:
            length = min(numel - done, room)
            pieces.append(_Piece(k, column, done, length, whole=length == numel))
            done += length
            room -= length
            if room == 0:
                yield _block(pieces, scratch, zeros, erase)
                pieces, room = [], step
    if pieces:
        yield _block(pieces, scratch, zeros, erase)


def _block(pieces: list[_Piece], scratch: Scratch, zeros: Tensor, erase: Erase | None) -> Tensor:
    lengths = [piece.length for piece in pieces]
    parts = [
        piece.of(g) if g is not None else zeros[: piece.length]
        for row in zip(*(piece.column for piece in pieces), strict=True)
        for piece, g in zip(pieces, row, strict=True)
    ]
    n = sum(lengths)
    X = scratch.joined(parts, len(pieces[0].column) * n).view(-1, n)
    if erase is not None:
        for piece, entries in zip(pieces, X.split(lengths, 1), strict=True):
            erase(piece.k, piece.start, entries)
    return X
