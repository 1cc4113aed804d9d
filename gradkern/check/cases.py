"""The cases of the self-check: every operator's results beside those of :mod:`gradkern.reference`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from gradkern import reference
from gradkern.ops import combine, gramian, project
from gradkern.ops.partners import ORDERED, PARTNERS
from gradkern.ops.schema import arithmetic_dtype

ops = torch.ops.gradkern

SHAPES = [(1, 1), (3, 9005), (13, 4109), (40, 4109)]
"""T x P: the least; T on both sides of where the kernels change their ways; P not whole chunks or tiles, and three less
than a multiple of 16, so that the rows of ``_matrix`` start where 128-bit loads are made."""
N_SEGMENTS = 2
BLOCKS = [1, 100, 128]
"""Of gradient suppression: each of the ways the kernels draw a mask."""
SEED, STEP, DROPPED = 2**63 + 5, 2**32 + 7, 0.45
"""Of gradient suppression: numbers of more than 32 bits, one of them with what int64 has for a sign."""

Comparison = tuple[Tensor, Tensor, Tensor]
"""A result, what it should be, and the size of the terms that were summed: three tensors of one shape."""


def _gramian(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            M = gramian(on_device, _tensor(offsets))
            yield from zip(M.view(-1, T, T), *_products(_blocks(J, offsets)), strict=True)


def _gramian_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        M = ops.gramian(cut.grads, cut.segments, N_SEGMENTS)
        yield from zip(M, *_products(cut.blocks()), strict=True)


def _cross(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T + 2, P, dtype, device)
        for offsets in _offsets(P):
            K = ops.cross(on_device[:T], on_device[T:], _tensor(offsets))
            corners = ([M[:T, T:] for M in Ms] for Ms in _products(_blocks(J, offsets)))
            yield from zip(K.view(-1, T, 2), *corners, strict=True)


def _combine(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            blocks = _blocks(J, offsets)
            w = _weights((len(blocks), T), dtype)
            g = combine(on_device, (w if offsets else w[0]).to(device), _tensor(offsets))
            sums = [_sums(block, ws[None]) for block, ws in zip(blocks, w, strict=True)]
            yield g, torch.cat([expected[0] for expected, _ in sums]), torch.cat([size[0] for _, size in sums])


def _combine_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        w = _weights((N_SEGMENTS, T), dtype)
        out = cut.empty(1, device)
        ops.combine(cut.grads, w.to(device), cut.segments, out)
        for k, (piece, s) in enumerate(zip(cut.pieces, cut.segments, strict=True)):
            expected, size = _sums(piece, w[s][None])
            yield out[k], expected[0], size[0]


def _project(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            blocks = _blocks(J, offsets)
            W = _weights((len(blocks), 2, T), dtype)
            Y = project(on_device, (W if offsets else W[0]).to(device), _tensor(offsets))
            sums = [_sums(block, Ws) for block, Ws in zip(blocks, W, strict=True)]
            yield Y, torch.cat([expected for expected, _ in sums], 1), torch.cat([size for _, size in sums], 1)


def _project_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        W = _weights((N_SEGMENTS, 2, T), dtype)
        out = cut.empty(2, device)
        ops.project(cut.grads, W.to(device), cut.segments, out)
        for k, (piece, s) in enumerate(zip(cut.pieces, cut.segments, strict=True)):
            yield torch.stack(out[k :: len(cut.pieces)]), *_sums(piece, W[s])


def _gramian_masked(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        for block in BLOCKS:
            cut = _cut(_matrix(T, P, dtype, device)[0], device)
            masking = cut.masking(block, device)
            M = ops.gramian(cut.grads, cut.segments, N_SEGMENTS, *masking)
            yield from zip(M, *_products(cut.erased(block).blocks()), strict=True)


def _combine_masked(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        for block in BLOCKS:
            cut = _cut(_matrix(T, P, dtype, device)[0], device)
            w = _weights((N_SEGMENTS, T), dtype)
            out = cut.empty(1, device)
            ops.combine(cut.grads, w.to(device), cut.segments, *cut.masking(block, device), out)
            for k, (piece, s) in enumerate(zip(cut.erased(block).pieces, cut.segments, strict=True)):
                expected, size = _sums(piece, w[s][None])
                yield out[k], expected[0], size[0]


def _gather(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        index = torch.randperm(P)[: -(-P // 3)].sort().values
        X = ops.gather(cut.grads, [piece.shape[1] for piece in cut.pieces], index.to(device))
        expected = torch.cat(cut.pieces, 1)[:, index].double()
        yield X, expected, expected.abs()


def _scatter(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for _, P in SHAPES:
        cut = _cut(_matrix(1, P, dtype, device)[0], device)
        index = torch.randperm(P)[: -(-P // 3)].sort().values
        values = torch.randn(len(index), dtype=torch.float64).to(arithmetic_dtype(dtype))
        out = [torch.zeros_like(o) for o in cut.empty(1, device)]
        ops.scatter(values.to(device), [piece.shape[1] for piece in cut.pieces], index.to(device), out)
        expected = torch.zeros(P, dtype=torch.float64).index_put((index,), values.double())
        yield torch.cat(out), expected, expected.abs()


def _gradvac(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The modified gradients C J, and the targets after the step."""
    if dtype != arithmetic_dtype(dtype):
        return  # a Gramian is never stored in 16 bits
    for T, _ in SHAPES:
        blocks = [_matrix(T, 64, torch.float64, device)[0] for _ in range(N_SEGMENTS)]
        M = torch.stack([reference.gramian(list(block)) for block in blocks]).to(dtype)
        keys, before = torch.rand(N_SEGMENTS, T, T), torch.rand(N_SEGMENTS, T, T, dtype=torch.float64) - 0.5
        targets, moving = before.to(device, copy=True), torch.ones(T, dtype=torch.bool, device=device)
        C = ops.gradvac(M.to(device), keys.to(device), targets, moving, 0.3).cpu()
        eps = torch.finfo(dtype).eps
        for s, (block, c, order) in enumerate(zip(blocks, C, keys.argsort(-1).tolist(), strict=True)):
            modified, moved = reference.gradvac(list(block), order, before[s], 0.3, eps)
            # Coefficients grow with every partner: each is as far off as what it was made from.
            size = (c.double().abs() @ block.abs()).sum(0).expand(T, -1)
            yield (c.double() @ block).to(dtype), torch.stack(modified), size
            yield targets[s].to(dtype), moved, torch.full_like(moved, T)


def _pcgrad(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The projected gradients themselves, C J: the reference has no coefficients."""
    if dtype != arithmetic_dtype(dtype):
        return  # a Gramian is never stored in 16 bits
    for T, _ in SHAPES:
        blocks = [_matrix(T, 64, torch.float64, device)[0] for _ in range(N_SEGMENTS)]
        M = torch.stack([reference.gramian(list(block)) for block in blocks]).to(dtype)
        for partner, n_orders in zip(PARTNERS, (N_SEGMENTS, 1, 1, 1, 1), strict=True):
            keys = torch.rand(n_orders, T, T)
            C = ops.pcgrad(M.to(device), keys.to(device) if partner in ORDERED else None, partner).cpu()
            for block, c, order in zip(blocks, C, keys.argsort(-1).expand(M.shape).tolist(), strict=True):
                expected = torch.stack(reference.pcgrad_of(partner, list(block), order))
                yield (c.double() @ block).to(dtype), expected, c.double().abs() @ block.abs()


def _pcgrad_matrix(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        keys = torch.rand(1, T, T)
        order = keys[0].argsort(-1).tolist()
        rows = list(J.double())
        for partner, mean in ((p, mean) for p in PARTNERS for mean in (False, True)):
            g = ops.pcgrad(on_device, keys.to(device) if partner in ORDERED else None, partner, mean)
            modified = torch.stack(reference.pcgrad_of(partner, rows, order))
            # A modified gradient is no longer than the original one: as far off as the sum of all.
            yield g, modified.mean(0) if mean else modified.sum(0), J.double().abs().sum(0) / (T if mean else 1)


def _pcgrad_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for partner in PARTNERS:
        yield from _whole(dtype, device, None, partner)


def _pcgrad_masked(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for partner, block in zip(PARTNERS, [*BLOCKS, *BLOCKS], strict=False):
        yield from _whole(dtype, device, block, partner)


def _gradvac_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    yield from _whole(dtype, device, None, None)


def _gradvac_masked(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for block in BLOCKS:
        yield from _whole(dtype, device, block, None)


def _whole(dtype: torch.dtype, device: torch.device, block: int | None, partner: str | None) -> Iterator[Comparison]:
    """Gramians, and what the weights found for them make of the gradients; without a partner of GradVac.

    Which is PCGrad with all partners to targets of 0.
    """
    T, P = SHAPES[1]
    cut = _cut(_matrix(T, P, dtype, device)[0], device)
    keys, out = torch.rand(N_SEGMENTS, T, T), cut.empty(1, device)
    of_order = keys.to(device) if partner is None or partner in ORDERED else None
    masking = () if block is None else (*cut.masking(block, device), True)
    others = (False, None, None, *masking, out)
    if partner is None:
        targets = torch.zeros(N_SEGMENTS, T, T, dtype=torch.float64, device=device)
        moving = torch.ones(T, dtype=torch.bool, device=device)
        M, *_ = ops.gradvac(cut.grads, cut.segments, N_SEGMENTS, of_order, targets, moving, 0.5, *others)
    else:
        M, *_ = ops.pcgrad(cut.grads, cut.segments, N_SEGMENTS, of_order, partner, *others)
    seen = cut if block is None else cut.erased(block)
    yield from zip(M, *_products(seen.blocks()), strict=True)
    for s, (rows, order) in enumerate(zip(seen.blocks(), keys.argsort(-1).tolist(), strict=True)):
        expected = torch.stack(reference.pcgrad_of(partner or "all", list(rows), order)).sum(0)
        # A modified gradient is no longer than the original one: as far off as the sum of all.
        size = rows.double().abs().sum(0)
        yield torch.cat([o for o, segment in zip(out, seen.segments, strict=True) if segment == s]), expected, size


def _adamw(dtype: torch.dtype, device: torch.device, block: int | None = None) -> Iterator[Comparison]:
    """Parameters and moments after a step, with amsgrad; entries that a mask drops as of gradient 0."""
    numbers = (0.1, 0.8, 0.9, 0.3, 1e-3)
    lr, *betas, weight_decay, eps = numbers
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        w = _weights((N_SEGMENTS, T), dtype)
        params = [torch.randn(piece.shape[1:], dtype=torch.float64).to(dtype) for piece in cut.pieces]
        moments = [
            torch.rand(p.shape, dtype=torch.float64).to(arithmetic_dtype(dtype)) for _ in range(3) for p in params
        ]
        on_device = [[x.to(device, copy=True) for x in xs] for xs in (params, moments)]
        steps = [torch.tensor(k + 2.0, device=device) for k in range(len(params))]
        step = (*on_device, steps, None, torch.tensor(0.5, device=device), list(numbers))
        if block is None:
            ops.adamw(cut.grads, w.to(device), cut.segments, *step)
        else:
            ops.adamw(cut.grads, w.to(device), cut.segments, *cut.masking(block, device), *step)
            cut = cut.erased(block)
        n = len(params)
        for k, (piece, s) in enumerate(zip(cut.pieces, cut.segments, strict=True)):
            (g,), (size,) = _sums(piece, w[s][None])
            expected = reference.adamw(
                params[k], moments[k::n], g, k + 2, 0.5 * lr, (betas[0], betas[1]), weight_decay, eps
            )
            results, before = (on_device[0][k], *on_device[1][k::n]), (params[k], *moments[k::n])
            for result, x, b in zip(results, expected, before, strict=True):
                # What a gradient's rounding does to a moment is in proportion to the gradient, or its square.
                yield result, x, x.abs() + b.double().abs() + size + size.square()


def _adamw_masked(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for block in BLOCKS:
        yield from _adamw(dtype, device, block)


CHECKS: dict[str, Callable[[torch.dtype, torch.device], Iterator[Comparison]]] = {
    "gramian": _gramian,
    "gramian.tensors": _gramian_tensors,
    "cross": _cross,
    "gramian.masked": _gramian_masked,
    "combine": _combine,
    "combine.tensors": _combine_tensors,
    "combine.masked": _combine_masked,
    "project": _project,
    "project.tensors": _project_tensors,
    "gather": _gather,
    "scatter": _scatter,
    "pcgrad": _pcgrad,
    "pcgrad.matrix": _pcgrad_matrix,
    "pcgrad.tensors": _pcgrad_tensors,
    "pcgrad.masked": _pcgrad_masked,
    "gradvac": _gradvac,
    "gradvac.tensors": _gradvac_tensors,
    "gradvac.masked": _gradvac_masked,
    "adamw": _adamw,
    "adamw.masked": _adamw_masked,
}
"""Every operator in ``torch.ops.gradkern``, by name and overload. Those on a matrix also run with ``offsets``."""


@dataclass(frozen=True)
class Cut:
    """A matrix cut into parameters, whose gradients are tensors of their own; one of them is missing.

    Attributes:
        pieces: (T, numel) for each parameter, on the CPU; zeros where the gradient is missing.
        grads: the gradients on the device, tasks times parameters, None for the missing one.
        segments: each parameter's segment.
    """

    pieces: list[Tensor]
    grads: list[Tensor | None]
    segments: list[int]

    def blocks(self) -> list[Tensor]:
        """(T, columns) for each segment."""
        none = self.pieces[0][:, :0]
        members = [[p for p, s in zip(self.pieces, self.segments, strict=True) if s == n] for n in range(N_SEGMENTS)]
        return [torch.cat([none, *pieces], 1) for pieces in members]

    def masking(self, block: int, device: torch.device) -> tuple[list[int], int, Tensor]:
        """What the masked operators take besides."""
        return self._units(block), block, torch.tensor([SEED - 2**64, STEP, round(DROPPED * 2**32)]).to(device)

    def erased(self, block: int) -> "Cut":
        """The same with zeros in all that the mask drops."""
        numels = [piece.shape[1] for piece in self.pieces]
        keep = [
            reference.kept(SEED, STEP, DROPPED, block, u, n) for u, n in zip(self._units(block), numels, strict=True)
        ]
        return replace(self, pieces=[torch.where(k, piece, 0) for k, piece in zip(keep, self.pieces, strict=True)])

    def _units(self, block: int) -> list[int]:
        return reference.first_units([piece.shape[1] for piece in self.pieces], block)

    def empty(self, n_rows: int, device: torch.device) -> list[Tensor]:
        """Tensors to write ``n_rows`` results into, full of NaN, so that what is not written shows."""
        return [piece.new_full(piece.shape[1:], math.nan).to(device) for _ in range(n_rows) for piece in self.pieces]


def _cut(J: Tensor, device: torch.device) -> Cut:
    T, P = J.shape
    pieces = [piece.clone() for piece in J.split([n for n in (P // 2, P // 3, P - P // 2 - P // 3) if n], 1)]
    grads: list[Tensor | None] = [piece[t].to(device, copy=True) for t in range(T) for piece in pieces]
    if T > 1:
        grads[1] = None
        pieces[1][0] = 0
    return Cut(pieces, grads, [k % N_SEGMENTS for k in range(len(pieces))])


def _matrix(T: int, P: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same random rows on the CPU and on ``device``, some distance apart in memory."""
    rows = torch.randn((T, P + 3), dtype=torch.float64).to(dtype)
    return rows[:, :P], rows.to(device)[:, :P]


def _weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random weights for rows of ``dtype``; with two rows or more one of them has the weight 0."""
    w = torch.randn(shape, dtype=torch.float64).to(arithmetic_dtype(dtype))
    w[..., 1:2] = 0
    return w


def _offsets(P: int) -> list[list[int] | None]:
    """No segments, and three, one of them empty."""
    return [None, [0, P // 3, P // 3, P]]


def _tensor(offsets: list[int] | None) -> Tensor | None:
    return None if offsets is None else torch.tensor(offsets)


def _blocks(J: Tensor, offsets: list[int] | None) -> list[Tensor]:
    return [J] if offsets is None else [J[:, a:b] for a, b in pairwise(offsets)]


def _products(blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The Gramian of each block, and for each entry the product of the two norms."""
    Ms = [reference.gramian(list(block)) for block in blocks]
    norms = [M.diagonal().sqrt() for M in Ms]
    return Ms, [torch.outer(n, n) for n in norms]


def _sums(block: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """W J, and the same of absolute values."""
    rows = list(block)
    return reference.project(rows, W.tolist()), reference.project([g.abs() for g in rows], W.abs().tolist())
