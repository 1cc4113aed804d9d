"""The cases of the self-check: each compares an operator's results with those of :mod:`gradkern.reference`."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradkern import reference
from gradkern.check.problems import (
    BLOCKS,
    N_SEGMENTS,
    SEED,
    SHAPES,
    STEP,
    Shapes,
    blocks_of,
    cut_apart,
    matrix,
    offsets_of,
    products,
    sums,
    tensor,
    weights,
)
from gradkern.ops import combine, gramian, operators, project
from gradkern.ops.arguments import AdamWState, AdamWStep, Coins, Mask, ProjectionArguments, TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.partners import ORDERED, PARTNERS
from gradkern.ops.registry import Comparison

MASKS = (None, *BLOCKS)
"""The blocks of the masks to check; None stands for no mask."""


@operators.gramian.check
def of_gramian(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare the Gramian of a matrix, whole and by segments."""
    for T, P in shapes:
        J, on_device = matrix(T, P, dtype, device)
        for offsets in offsets_of(P):
            M = gramian(on_device, tensor(offsets))
            yield from zip(M.view(-1, T, T), *products(blocks_of(J, offsets)), strict=True)


@operators.gramian_tensors.check
def of_gramian_tensors(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare the Gramian of separate tensors, whole and under masks."""
    for T, P in shapes:
        for block in MASKS:
            cut = cut_apart(matrix(T, P, dtype, device)[0], device)
            mask = None if block is None else cut.mask(block, device)
            M = operators.gramian_tensors(cut.rows, mask)
            seen = cut if block is None else cut.erased(block)
            yield from zip(M, *products(seen.blocks()), strict=True)


@operators.cross.check
def _cross(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = matrix(T + 2, P, dtype, device)
        for offsets in offsets_of(P):
            K = operators.cross(on_device[:T], on_device[T:], tensor(offsets))
            corners = ([M[:T, T:] for M in Ms] for Ms in products(blocks_of(J, offsets)))
            yield from zip(K.view(-1, T, 2), *corners, strict=True)


@operators.cross_tensors.check
def _cross_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        for block in MASKS:
            cut = cut_apart(matrix(T + 2, P, dtype, device)[0], device)
            mask = None if block is None else cut.mask(block, device)
            n = T * len(cut.rows.segments)
            first = TaskGrads(cut.rows.grads[:n], cut.rows.segments, cut.rows.n_segments)
            K = operators.cross_tensors(first, cut.rows.grads[n:], mask)
            seen = cut if block is None else cut.erased(block)
            corners = ([M[:T, T:] for M in Ms] for Ms in products(seen.blocks()))
            yield from zip(K, *corners, strict=True)


@operators.combine.check
def of_combine(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare the combination of a matrix, whole and by segments."""
    return _combinations(dtype, device, combine, shapes)


@operators.combine_out.check
def _combine_out(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    return _combinations(
        dtype, device, lambda J, *given: combine(J, *given, out=torch.full_like(J[0], math.nan)), SHAPES
    )


def _combinations(
    dtype: torch.dtype, device: torch.device, compute: Callable[..., Tensor], shapes: Shapes
) -> Iterator[Comparison]:
    for T, P in shapes:
        J, on_device = matrix(T, P, dtype, device)
        for offsets in offsets_of(P):
            blocks = blocks_of(J, offsets)
            w = weights((len(blocks), T), dtype)
            g = compute(on_device, (w if offsets else w[0]).to(device), tensor(offsets))
            expected = [sums(block, ws[None]) for block, ws in zip(blocks, w, strict=True)]
            yield g, torch.cat([total[0] for total, _ in expected]), torch.cat([size[0] for _, size in expected])


@operators.combine_tensors.check
def of_combine_tensors(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare the combination of separate tensors, whole and under masks."""
    for T, P in shapes:
        for block in MASKS:
            cut = cut_apart(matrix(T, P, dtype, device)[0], device)
            w, out = weights((N_SEGMENTS, T), dtype), cut.empty(device)
            mask = None if block is None else cut.mask(block, device)
            operators.combine_tensors(cut.rows, w.to(device), out, mask, None)
            seen = cut if block is None else cut.erased(block)
            for k, (piece, s) in enumerate(zip(seen.pieces, seen.segments, strict=True)):
                expected, size = sums(piece, w[s][None])
                yield out[k], expected[0], size[0]


@operators.project.check
def of_project(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare the projection of a matrix, whole and by segments."""
    for T, P in shapes:
        J, on_device = matrix(T, P, dtype, device)
        for offsets in offsets_of(P):
            blocks = blocks_of(J, offsets)
            W = weights((len(blocks), 2, T), dtype)
            Y = project(on_device, (W if offsets else W[0]).to(device), tensor(offsets))
            expected = [sums(block, Ws) for block, Ws in zip(blocks, W, strict=True)]
            yield Y, torch.cat([total for total, _ in expected], 1), torch.cat([size for _, size in expected], 1)


@operators.gather.check
def _gather(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = cut_apart(matrix(T, P, dtype, device)[0], device)
        index = torch.randperm(P)[: -(-P // 3)].sort().values
        X = operators.gather(cut.grads, [piece.shape[1] for piece in cut.pieces], index.to(device))
        expected = torch.cat(cut.pieces, 1)[:, index].double()
        yield X, expected, expected.abs()


@operators.scatter.check
def _scatter(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for _, P in SHAPES:
        cut = cut_apart(matrix(1, P, dtype, device)[0], device)
        index = torch.randperm(P)[: -(-P // 3)].sort().values
        values = torch.randn(len(index), dtype=torch.float64).to(arithmetic_dtype(dtype))
        out = [torch.zeros_like(o) for o in cut.empty(device)]
        operators.scatter(values.to(device), [piece.shape[1] for piece in cut.pieces], index.to(device), out)
        expected = torch.zeros(P, dtype=torch.float64).index_put((index,), values.double())
        yield torch.cat(out), expected, expected.abs()


@operators.pcgrad.check
def _pcgrad(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare the projected gradients themselves, C J: the reference has no coefficients."""
    if dtype != arithmetic_dtype(dtype):
        return  # a Gramian is never stored in 16 bits
    for T, _ in SHAPES:
        blocks = [matrix(T, 64, torch.float64, device)[0] for _ in range(N_SEGMENTS)]
        M = torch.stack([reference.gramian(list(block)) for block in blocks]).to(dtype)
        for partner, n_orders in zip(PARTNERS, (N_SEGMENTS, 1, 1, 1, 1), strict=True):
            keys = torch.rand(n_orders, T, T)
            C = operators.pcgrad(M.to(device), keys.to(device) if partner in ORDERED else None, partner).cpu()
            for block, c, order in zip(blocks, C, keys.argsort(-1).expand(M.shape).tolist(), strict=True):
                expected = torch.stack(reference.pcgrad_of(partner, list(block), order))
                yield (c.double() @ block).to(dtype), expected, c.double().abs() @ block.abs()


@operators.pcgrad_matrix.check
def _pcgrad_matrix(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    return _updates(dtype, device, operators.pcgrad_matrix)


@operators.pcgrad_matrix_out.check
def _pcgrad_matrix_out(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    def compute(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
        out = torch.full_like(J[0], math.nan)
        operators.pcgrad_matrix_out(J, keys, partner, mean, out)
        return out

    return _updates(dtype, device, compute)


@operators.surgery_blocks.check
def _surgery_blocks(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    def compute(J: Tensor, keys: Tensor | None, partner: str, mean: bool) -> Tensor:
        method = ProjectionArguments(keys, partner, None, None, 0.0, mean)
        return operators.surgery_blocks([J], method)[2][0]

    return _updates(dtype, device, compute)


def _updates(dtype: torch.dtype, device: torch.device, compute: Callable[..., Tensor]) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = matrix(T, P, dtype, device)
        keys = torch.rand(1, T, T)
        order = keys[0].argsort(-1).tolist()
        rows = list(J.double())
        for partner, mean in ((p, mean) for p in PARTNERS for mean in (False, True)):
            g = compute(on_device, keys.to(device) if partner in ORDERED else None, partner, mean)
            modified = torch.stack(reference.pcgrad_of(partner, rows, order))
            # A modified gradient is not longer than the original, so the error is as large as for the sum of all.
            yield g, modified.mean(0) if mean else modified.sum(0), J.double().abs().sum(0) / (T if mean else 1)


@operators.gradvac.check
def _gradvac(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare the modified gradients C J, and the targets after the step."""
    if dtype != arithmetic_dtype(dtype):
        return  # a Gramian is never stored in 16 bits
    for T, _ in SHAPES:
        blocks = [matrix(T, 64, torch.float64, device)[0] for _ in range(N_SEGMENTS)]
        M = torch.stack([reference.gramian(list(block)) for block in blocks]).to(dtype)
        keys, before = torch.rand(N_SEGMENTS, T, T), torch.rand(N_SEGMENTS, T, T, dtype=torch.float64) - 0.5
        targets, update_mask = before.to(device, copy=True), torch.ones(T, dtype=torch.bool, device=device)
        C = operators.gradvac(M.to(device), keys.to(device), targets, update_mask, 0.3).cpu()
        eps = torch.finfo(dtype).eps
        for s, (block, c, order) in enumerate(zip(blocks, C, keys.argsort(-1).tolist(), strict=True)):
            modified, moved = reference.gradvac(list(block), order, before[s], 0.3, eps)
            # Coefficients grow with every partner, and each is as far off as the one that it was made from.
            size = (c.double().abs() @ block.abs()).sum(0).expand(T, -1)
            yield (c.double() @ block).to(dtype), torch.stack(modified), size
            yield targets[s].to(dtype), moved, torch.full_like(moved, T)


@operators.surgery.check
def of_surgery(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES[1:2]) -> Iterator[Comparison]:
    """Compare Gramians and combinations. GradVac with targets of 0 is PCGrad with all partners."""
    for (T, P), block in ((shape, block) for shape in shapes for block in MASKS):
        for partner in (*PARTNERS, None):
            cut = cut_apart(matrix(T, P, dtype, device)[0], device)
            keys, out = torch.rand(N_SEGMENTS, T, T), cut.empty(device)
            mask: Mask | None = None if block is None else cut.mask(block, device)
            if partner is None:
                targets = torch.zeros(N_SEGMENTS, T, T, dtype=torch.float64, device=device)
                update_mask = torch.ones(T, dtype=torch.bool, device=device)
                method = ProjectionArguments(keys.to(device), "all", targets, update_mask, 0.5, False)
            else:
                method = ProjectionArguments(
                    keys.to(device) if partner in ORDERED else None, partner, None, None, 0.0, False
                )
            M, _ = operators.surgery(cut.rows, method, out, mask, True, None)
            seen = cut if block is None else cut.erased(block)
            yield from zip(M, *products(seen.blocks()), strict=True)
            for s, (rows, order) in enumerate(zip(seen.blocks(), keys.argsort(-1).tolist(), strict=True)):
                expected = torch.stack(reference.pcgrad_of(partner or "all", list(rows), order)).sum(0)
                # A modified gradient is not longer than the original, so the error is as large as for the sum of all.
                of_segment = [o for o, segment in zip(out, seen.segments, strict=True) if segment == s]
                yield torch.cat(of_segment), expected, rows.double().abs().sum(0)


@operators.graddrop.check
def _graddrop(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare the results, each of which shows the sign that is chosen, without and with a leak."""
    for T, P in SHAPES:
        for block, leaks in ((block, leaks) for block in MASKS for leaks in (None, torch.rand(T))):
            cut = cut_apart(matrix(T, P, dtype, device)[0], device)
            out, stream = cut.empty(device), torch.tensor([SEED - 2**64, STEP - 2**63]).to(device)
            positions = reference.first_units([len(o) for o in out], 1)
            coefficients = None if leaks is None else torch.stack((torch.ones(T), leaks)).to(device)
            mask = None if block is None else cut.mask(block, device)
            operators.graddrop(cut.rows, Coins(positions, stream), coefficients, out, mask, None)
            seen = cut if block is None else cut.erased(block)
            shares = [0.0] * T if leaks is None else leaks.tolist()
            for k, piece in enumerate(seen.pieces):
                places = positions[k] + torch.arange(piece.shape[1])
                expected = reference.graddrop(list(piece), shares, SEED, STEP, places)
                yield out[k], expected, piece.double().abs().sum(0)


@operators.trimmed_mean.check
def _trimmed_mean(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        for block, k in ((block, k) for block in MASKS for k in (0, 1, 3) if 2 * k < T):
            cut = cut_apart(matrix(T, P, dtype, device)[0], device)
            out, mask = cut.empty(device), None if block is None else cut.mask(block, device)
            weights = torch.randint(0, 2, (T,)) if k else None
            operators.trimmed_mean(cut.rows, k, None if weights is None else weights.to(device), out, mask, None)
            seen = cut if block is None else cut.erased(block)
            present = None if weights is None else weights.bool().tolist()
            for o, piece in zip(out, seen.pieces, strict=True):
                yield o, reference.trimmed_mean(list(piece), k, present), piece.double().abs().sum(0)


@operators.adamw.check
def of_adamw(dtype: torch.dtype, device: torch.device, shapes: Shapes = SHAPES) -> Iterator[Comparison]:
    """Compare parameters and moments after a step, with amsgrad; entries that a mask drops have the gradient 0."""
    numbers = (0.1, 0.8, 0.9, 0.3, 1e-3)
    lr, *betas, weight_decay, eps = numbers
    for (T, P), block in ((shape, block) for shape in shapes for block in MASKS):
        cut = cut_apart(matrix(T, P, dtype, device)[0], device)
        w = weights((N_SEGMENTS, T), dtype)
        params = [torch.randn(piece.shape[1:], dtype=torch.float64).to(dtype) for piece in cut.pieces]
        moments = [
            torch.rand(p.shape, dtype=torch.float64).to(arithmetic_dtype(dtype)) for _ in range(3) for p in params
        ]
        moved, moved_moments = ([x.to(device, copy=True) for x in xs] for xs in (params, moments))
        steps = [torch.tensor(k + 2.0, device=device) for k in range(len(params))]
        step = AdamWStep(None, torch.tensor(0.5, device=device), list(numbers))
        mask = None if block is None else cut.mask(block, device)
        operators.adamw(cut.rows, w.to(device), AdamWState(moved, moved_moments, steps), step, mask, None)
        seen, n = cut if block is None else cut.erased(block), len(params)
        for k, (piece, s) in enumerate(zip(seen.pieces, seen.segments, strict=True)):
            (g,), (size,) = sums(piece, w[s][None])
            expected = reference.adamw(
                params[k], moments[k::n], g, k + 2, 0.5 * lr, (betas[0], betas[1]), weight_decay, eps
            )
            results, before = (moved[k], *moved_moments[k::n]), (params[k], *moments[k::n])
            for result, x, b in zip(results, expected, before, strict=True):
                # The rounding of a gradient changes a moment in proportion to the gradient, or its square.
                yield result, x, x.abs() + b.double().abs() + size + size.square()
