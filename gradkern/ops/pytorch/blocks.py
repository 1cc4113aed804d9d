"""Gradients of several tensors as the rows of J, gathered a block of columns at a time into memory that stays in cache.

Each block overwrites the last one, so that gathering and conversion cost no memory traffic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Erase = Callable[[int, int, Tensor], None]
"""Given a tensor's number, and from which entry on a matrix holds its rows: put 0 for those that do not count."""
Columns = Mapping[int, Sequence[Tensor | None]]
"""By its number, the T gradients of a tensor, each of one dimension."""


def flat(g: Tensor) -> Tensor:
    """A dense tensor as the memory it is."""
    return g.flatten() if g.is_contiguous() else g.as_strided((g.numel(),), (1,))


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


def gathered(
    columns: Columns, scratch: Scratch, blocks: Sequence[tuple[int, int]], erase: Erase | None
) -> Iterator[tuple[Tensor, int]]:
    """Blocks of the rows that tensors form one after another, (T, stride), and how many columns each one holds.

    Args:
        columns: the tensors' gradients.
        scratch: where each block is put, in the place of the last one.
        blocks: their columns and strides; what lies between a row's columns and the next row is not initialized.
        erase: puts 0 for entries that do not count.
    """
    longest = max(n for n, _ in blocks)
    zeros = next(g for column in columns.values() for g in column if g is not None).new_empty(0)
    pieces: list[_Piece] = []
    left = iter(blocks)
    room, stride = next(left)
    for k, column in columns.items():
        done, numel = 0, next(len(g) for g in column if g is not None)
        if len(zeros) < min(longest, numel) and any(g is None for g in column):
            zeros = zeros.new_zeros(min(longest, numel))
        while done < numel:
            length = min(numel - done, room)
            pieces.append(_Piece(k, column, done, length, whole=length == numel))
            done += length
            room -= length
            if room == 0:
                yield _block(pieces, scratch, zeros, stride, erase), sum(piece.length for piece in pieces)
                pieces = []
                room, stride = next(left, (0, 0))


def _block(pieces: list[_Piece], scratch: Scratch, zeros: Tensor, stride: int, erase: Erase | None) -> Tensor:
    lengths = [piece.length for piece in pieces]
    gap = [zeros.new_empty(stride - sum(lengths))] if sum(lengths) < stride else []
    parts: list[Tensor] = []
    for row in zip(*(piece.column for piece in pieces), strict=True):
        parts += [piece.of(g) if g is not None else zeros[: piece.length] for piece, g in zip(pieces, row, strict=True)]
        parts += gap
    T = len(pieces[0].column)
    X = scratch.joined(parts, T * stride).view(T, stride)
    if erase is not None:
        for piece, entries in zip(pieces, X.split([*lengths, *map(len, gap)], 1), strict=False):
            erase(piece.k, piece.start, entries)
    return X
