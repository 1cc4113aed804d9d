"""Gradients of several tensors as the rows of J, gathered a block of columns at a time into memory that stays in cache.

Each block overwrites the last one, so that gathering and conversion cost no memory traffic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Erase = Callable[[int, int, Tensor], None]
"""Sets dropped entries to 0, given a tensor's number, its first entry, and a matrix of its rows from that entry on."""
Columns = Mapping[int, Sequence[Tensor | None]]
"""The T gradients of each tensor, flattened, by the number of the tensor."""


def flat(g: Tensor) -> Tensor:
    """Return the memory of a dense tensor as a tensor of one dimension."""
    return g.flatten() if g.is_contiguous() else g.as_strided((g.numel(),), (1,))


class Scratch:
    """Memory that each block overwrites. It grows to the size of the largest block."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._stored = like.new_empty(0)
        self._converted = self._stored.to(dtype)

    def joined(self, parts: list[Tensor], count: int) -> Tensor:
        """Return ``parts`` concatenated, ``count`` numbers in all."""
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
        """Return the piece of a gradient. It does not slice a whole tensor, which takes as long as copying a bias."""
        return g if self.whole else g[self.start : self.start + self.length]


def gathered(
    columns: Columns, scratch: Scratch, blocks: Sequence[tuple[int, int]], erase: Erase | None
) -> Iterator[tuple[Tensor, int]]:
    """Yield blocks (T, stride) of the rows of concatenated tensors, and the number of columns in each block.

    Args:
        columns: the tensors' gradients.
        scratch: the memory of the blocks; each overwrites the last.
        blocks: their numbers of columns and strides; the gap between a row's columns and the next row is uninitialized.
        erase: sets dropped entries to 0; None if none are dropped.
    """
    longest = max(n for n, _ in blocks)
    zeros = next(g for column in columns.values() for g in column if g is not None).new_empty(0)
    pieces: list[_Piece] = []
    remaining = iter(blocks)
    room, stride = next(remaining)
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
                room, stride = next(remaining, (0, 0))


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
