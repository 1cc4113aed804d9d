"""The shortest vector of a convex hull, exactly (Wolfe 1976, "Finding the Nearest Point in a Polytope").

Minimise wᵀMw over w >= 0 with Σ w = 1, for many Gramians M at once. An active-set method: from the shortest row, each
round solves for the shortest vector of the affine hull of the rows in the support. If that lies inside, the row that
falls short of it most joins the support; else the point moves there as far as the hull goes, and the row it meets the
boundary at leaves. Rows of very different lengths stay apart because all is solved in the scale of the cosines K: with
n_i = √M_ii, v = n w and u = 1/n, the problem is to minimise vᵀKv over v >= 0 with uᵀv = 1.

A fixed number of rounds, and masks of who is done: the host reads nothing. Two rows that differ by less than rounding
shows, 1e-8 of their length, may stand for each other; then the answer is that much off.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS_PER_TASK = 3
"""Most problems take T rounds or fewer. The hardest of 480,000 random ones took 2.5 T: 12 rows, nearly antiparallel in
pairs."""
NOISE = 1e-13
"""How far a row may fall short in proportion to the terms of its product: a hundred roundings of float64."""


def min_norm(M: Tensor, among: Tensor | None = None) -> Tensor:
    """Return the weights w of the shortest vector of the convex hull.

    Args:
        M: (..., T, T), Gramians; leading dimensions are independent problems.
        among: (..., T) bool, the rows of each hull, at least one; None for all. The others get the weight 0.

    Returns:
        (..., T) float64, w >= 0 of sum 1. Where rows are zero they share the weight alone. Not a number in a problem
        with an entry that is not finite.
    """
    T = M.shape[-1]
    M = M.double()
    everyone = torch.ones(M.shape[:-1], dtype=torch.bool, device=M.device)
    inside = everyone if among is None else everyone & among
    finite = (M.isfinite() | ~inside.unsqueeze(-1) | ~inside.unsqueeze(-2)).all(-1).all(-1, keepdim=True)
    M = torch.where(finite.unsqueeze(-1), M, 0.0)
    n = M.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    zero = inside & (n == 0)
    rows = inside & ~zero
    n = torch.where(rows, n, 1.0)
    K = (M / n.unsqueeze(-1) / n.unsqueeze(-2)).clamp(-1, 1)
    shortest = torch.where(rows, n, torch.inf).amin(-1, keepdim=True).clamp_max(torch.finfo(n.dtype).max)
    point = _start(K, shortest / n, rows)
    for _ in range(ROUNDS_PER_TASK * T if T > 1 else 0):
        point = _round(point, K, shortest / n)
    w = point.v / n
    w = w / w.sum(-1, keepdim=True)
    w = torch.where(zero.any(-1, keepdim=True), zero.double() / zero.sum(-1, keepdim=True), w)
    return torch.where(finite, w, torch.nan)


class _Point(NamedTuple):
    """State of the search: a point of the hull, the support whose affine hull is next, and who is done.

    A row of the support has the weight 0 only when it has just joined. If it leaves at once, it is barred: rounding
    hides what sets it apart from the others, and it would come back for ever.
    """

    v: Tensor
    support: Tensor
    barred: Tensor
    done: Tensor


def _start(K: Tensor, u: Tensor, rows: Tensor) -> _Point:
    """The shortest row alone."""
    support = rows & _at(torch.where(rows, u, -1.0).argmax(-1), rows)
    return _Point(support / u, support, ~rows, ~rows.any(-1, keepdim=True))


def _round(point: _Point, K: Tensor, u: Tensor) -> _Point:
    v, support, barred, done = point
    y, square = _affine(K, u, support)
    outside = support & ~(y > 0)
    leaves = outside.any(-1, keepdim=True)
    # How far the segment from v to y stays in the hull.
    reach = torch.where(outside, v / (v - y).clamp_min(torch.finfo(v.dtype).tiny), torch.inf)
    theta, first = reach.min(-1, keepdim=True)
    partway = torch.where(_at(first.squeeze(-1), support), 0.0, v + theta * (y - v)).clamp_min(0)
    left = support & leaves & (partway == 0)
    # Optimal: (Kv)_i >= vᵀKv u_i for all i.
    short = (K @ y.unsqueeze(-1)).squeeze(-1) - square * u
    terms = (K.abs() @ y.abs().unsqueeze(-1)).squeeze(-1)
    size = terms + (terms * y.abs()).sum(-1, keepdim=True) * u
    open_ = ~support & ~barred & (short < -NOISE * size)
    worst = _at(torch.where(open_, short, torch.inf).argmin(-1), support) & open_
    moved = torch.where(leaves, partway, y)
    grown = torch.where(leaves, support & ~left, support | worst)
    barred = barred | (left & (theta == 0))
    done = done | ~y.isfinite().all(-1, keepdim=True)
    finished = done | (~leaves & ~open_.any(-1, keepdim=True))
    return _Point(torch.where(done, v, moved), torch.where(done, support, grown), barred, finished)


def _affine(K: Tensor, u: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest vector of the affine hull of the support, v with uᵀv = 1, and its square (..., 1)."""
    both = support.unsqueeze(-1) & support.unsqueeze(-2)
    edge = torch.where(support, u, 0.0).unsqueeze(-1)
    inner = torch.where(both, K, torch.diag_embed((~support).to(K.dtype)))
    border = torch.cat((edge.mT, torch.zeros_like(edge[..., :1, :])), -1)
    bordered = torch.cat((torch.cat((inner, edge), -1), border), -2)
    unit = torch.zeros_like(bordered[..., 0])
    unit[..., -1] = 1
    # Without a check of errors, which would read the device.
    solved = torch.linalg.solve_ex(bordered, unit, check_errors=False).result
    return torch.where(support, solved[..., :-1], 0.0), -solved[..., -1:]


def _at(index: Tensor, like: Tensor) -> Tensor:
    """A mask of ``like``'s shape, true at ``index`` of the last dimension."""
    return torch.arange(like.shape[-1], device=like.device) == index.unsqueeze(-1)
