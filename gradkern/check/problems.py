"""The problems of the self-check: random task gradients, and the reference's results for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops.arguments import Mask, TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype

Shapes = Sequence[tuple[int, int]]
SHAPES: Shapes = [(1, 1), (3, 9005), (13, 4109), (40, 4109)]
"""T x P: the smallest, and T on both sides of the kernels' thresholds. P does not fill whole chunks or tiles. It is
three less than a multiple of 16, so that the rows of :func:`matrix` start at addresses with 128-bit loads."""
N_SEGMENTS = 2
BLOCKS = [1, 100, 128]
"""Block sizes of gradient suppression, one for each way in which the kernels draw a mask."""
SEED, STEP, DROPPED = 2**63 + 5, 2**32 + 7, 0.45
"""Numbers of gradient suppression. Two have more than 32 bits, and one of these has the sign bit of int64 set."""


@dataclass(frozen=True)
class Cut:
    """Holds a matrix cut into parameters. Their gradients are separate tensors, one of which is missing.

    Attributes:
        pieces: (T, numel) for each parameter, on the CPU; zeros where the gradient is missing.
        grads: the gradients on the device, tasks times parameters, None for the missing one.
        segments: each parameter's segment.
    """

    pieces: list[Tensor]
    grads: list[Tensor | None]
    segments: list[int]

    def blocks(self) -> list[Tensor]:
        """Return (T, columns) for each segment."""
        none = self.pieces[0][:, :0]
        members = [[p for p, s in zip(self.pieces, self.segments, strict=True) if s == n] for n in range(N_SEGMENTS)]
        return [torch.cat([none, *pieces], 1) for pieces in members]

    @property
    def rows(self) -> TaskGrads:
        """The gradients as the operators take them."""
        return TaskGrads(self.grads, self.segments, N_SEGMENTS)

    def mask(self, block: int, device: torch.device) -> Mask:
        """Return a mask as the operators take it."""
        state = torch.tensor([SEED - 2**64, STEP, round(DROPPED * 2**32)]).to(device)
        return Mask(self._units(block), block, state)

    def erased(self, block: int) -> "Cut":
        """Return the same with zeros in the entries that the mask drops."""
        numels = [piece.shape[1] for piece in self.pieces]
        keep = [
            reference.kept(SEED, STEP, DROPPED, block, u, n) for u, n in zip(self._units(block), numels, strict=True)
        ]
        return replace(self, pieces=[torch.where(k, piece, 0) for k, piece in zip(keep, self.pieces, strict=True)])

    def _units(self, block: int) -> list[int]:
        return reference.first_units([piece.shape[1] for piece in self.pieces], block)

    def empty(self, device: torch.device) -> list[Tensor]:
        """Return tensors to write a result into, full of NaN, so that unwritten elements show."""
        return [piece.new_full(piece.shape[1:], math.nan).to(device) for piece in self.pieces]


def cut_apart(J: Tensor, device: torch.device) -> Cut:
    """Cut a matrix into parameters, with one gradient missing if there are two tasks or more, and two parameters."""
    T, P = J.shape
    pieces = [piece.clone() for piece in J.split([n for n in (P // 2, P // 3, P - P // 2 - P // 3) if n], 1)]
    grads: list[Tensor | None] = [piece[t].to(device, copy=True) for t in range(T) for piece in pieces]
    if T > 1 and len(pieces) > 1:
        grads[1] = None
        pieces[1][0] = 0
    return Cut(pieces, grads, [k % N_SEGMENTS for k in range(len(pieces))])


def matrix(T: int, P: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the same random rows on the CPU and on ``device``, some distance apart in memory."""
    rows = torch.randn((T, P + 3), dtype=torch.float64).to(dtype)
    return rows[:, :P], rows.to(device)[:, :P]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return random weights for rows of ``dtype``; with two rows or more one of them has the weight 0."""
    w = torch.randn(shape, dtype=torch.float64).to(arithmetic_dtype(dtype))
    w[..., 1:2] = 0
    return w


def offsets_of(P: int) -> list[list[int] | None]:
    """Return the offsets of no segments, and of three segments, one of them empty."""
    return [None, [0, P // 3, P // 3, P]]


def tensor(offsets: list[int] | None) -> Tensor | None:
    """Return offsets as the operators take them."""
    return None if offsets is None else torch.tensor(offsets)


def blocks_of(J: Tensor, offsets: list[int] | None) -> list[Tensor]:
    """Return the columns of each segment."""
    return [J] if offsets is None else [J[:, a:b] for a, b in pairwise(offsets)]


def products(blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the Gramian of each block, and for each entry the product of the two norms."""
    Ms = [reference.gramian(list(block)) for block in blocks]
    norms = [M.diagonal().sqrt() for M in Ms]
    return Ms, [torch.outer(n, n) for n in norms]


def sums(block: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return W J, and the same of absolute values."""
    rows = list(block)
    return reference.project(rows, W.tolist()), reference.project([g.abs() for g in rows], W.abs().tolist())
