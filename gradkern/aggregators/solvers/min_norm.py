"""The shortest vector of a convex hull, exactly (Wolfe 1976, "Finding the Nearest Point in a Polytope").

Minimise wᵀMw over w >= 0 with Σ w = 1, for many Gramians M at once. The method is an active-set method. It starts from
the shortest row. Each round solves for the shortest vector of the affine hull of the rows in the support. If that
vector lies in the convex hull, the row that violates optimality most joins the support. Otherwise the point moves
towards that vector until it meets the boundary of the convex hull, and the row whose weight becomes 0 there leaves.
Rows of very different lengths stay distinct because the problem is solved in the scale of the cosines K: with
n_i = √M_ii, v = n w and u = 1/n, it is to minimise vᵀKv over v >= 0 with uᵀv = 1.

The number of rounds is fixed, and a mask marks the problems that are done, so the host reads nothing. Two rows that
differ by less than rounding resolves, 1e-8 of their length, may be mistaken for each other; then the result is off by
that much.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.ops.cosines import cosines

ROUNDS_PER_TASK = 3
"""Most problems take T rounds or fewer. The hardest of 480,000 random ones took 2.5 T: 12 rows, nearly antiparallel in
pairs."""
NOISE = 1e-13
"""The tolerance of the optimality condition, relative to the terms of its product: some 900 roundings of float64."""


def min_norm(M: Tensor, among: Tensor | None = None) -> Tensor:
    """Return the weights w of the shortest vector of the convex hull.

    Args:
        M: (..., T, T), Gramians; leading dimensions are independent problems.
        among: (..., T) bool, the rows of each hull, at least one; None for all. The others get the weight 0.

    Returns:
        (..., T) float64, w >= 0 with sum 1. A zero row is left out of its hull and gets the weight 0; if all are zero,
        they share the weight. A problem with an entry that is not finite gets NaN.
    """
    T = M.shape[-1]
    M = M.double()
    everything = torch.ones(M.shape[:-1], dtype=torch.bool, device=M.device)
    members = everything if among is None else everything & among
    inside = members.unsqueeze(-1) & members.unsqueeze(-2)
    finite = (M.isfinite() | ~inside).all(-1).all(-1, keepdim=True)
    M = torch.where(inside & finite.unsqueeze(-1), M, 0.0)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    rows = n != 0
    n = torch.where(rows, n, 1.0)
    K = cosines(M)
    shortest = torch.where(rows, n, torch.inf).amin(-1, keepdim=True).clamp_max(torch.finfo(n.dtype).max)
    point = _start(K, shortest / n, rows)
    for _ in range(ROUNDS_PER_TASK * T if T > 1 else 0):
        point = _round(point, K, shortest / n)
    w = point.v / n
    w = w / w.sum(-1, keepdim=True)
    w = torch.where(rows.any(-1, keepdim=True), w, members.double() / members.sum(-1, keepdim=True))
    return torch.where(finite, w, torch.nan)


class _Point(NamedTuple):
    """State of the search: a point of the hull, the support whose affine hull is solved next, and the problems done.

    A row of the support has weight 0 only if it has just joined. If it leaves at once, it is barred: rounding hides its
    difference from the other rows, and it would join again forever.
    """

    v: Tensor
    support: Tensor
    barred: Tensor
    done: Tensor


def _start(K: Tensor, u: Tensor, rows: Tensor) -> _Point:
    """Return the state whose support is the shortest row alone."""
    support = rows & _at(torch.where(rows, u, -1.0).argmax(-1), rows)
    return _Point(support / u, support, ~rows, ~rows.any(-1, keepdim=True))


def _round(point: _Point, K: Tensor, u: Tensor) -> _Point:
    """Do one round of the active-set method; see the module."""
    v, support, barred, done = point
    y, square = _affine(K, u, support)
    outside = support & ~(y > 0)
    leaves = outside.any(-1, keepdim=True)
    # The share of the segment from v to y that lies in the hull.
    reach = torch.where(outside, v / (v - y).clamp_min(torch.finfo(v.dtype).tiny), torch.inf)
    theta, first = reach.min(-1, keepdim=True)
    partway = torch.where(_at(first.squeeze(-1), support), 0.0, v + theta * (y - v)).clamp_min(0)
    left = support & leaves & (partway == 0)
    # Optimal: (Kv)_i >= vᵀKv u_i for all i.
    slack = (K @ y.unsqueeze(-1)).squeeze(-1) - square * u
    terms = (K.abs() @ y.abs().unsqueeze(-1)).squeeze(-1)
    size = terms + (terms * y.abs()).sum(-1, keepdim=True) * u
    violating = ~support & ~barred & (slack < -NOISE * size)
    worst = _at(torch.where(violating, slack, torch.inf).argmin(-1), support) & violating
    moved = torch.where(leaves, partway, y)
    grown = torch.where(leaves, support & ~left, support | worst)
    barred = barred | (left & (theta == 0))
    done = done | ~y.isfinite().all(-1, keepdim=True)
    finished = done | (~leaves & ~violating.any(-1, keepdim=True))
    return _Point(torch.where(done, v, moved), torch.where(done, support, grown), barred, finished)


def _affine(K: Tensor, u: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shortest vector of the support's affine hull, v with uᵀv = 1, and its squared length (..., 1)."""
    both = support.unsqueeze(-1) & support.unsqueeze(-2)
    edge = torch.where(support, u, 0.0).unsqueeze(-1)
    inner = torch.where(both, K, torch.diag_embed((~support).to(K.dtype)))
    border = torch.cat((edge.mT, torch.zeros_like(edge[..., :1, :])), -1)
    bordered = torch.cat((torch.cat((inner, edge), -1), border), -2)
    unit = torch.zeros_like(bordered[..., 0])
    unit[..., -1] = 1
    # It does not check for errors, because that would read the device.
    solved = torch.linalg.solve_ex(bordered, unit, check_errors=False).result
    return torch.where(support, solved[..., :-1], 0.0), -solved[..., -1:]


def _at(index: Tensor, like: Tensor) -> Tensor:
    """Return a mask of ``like``'s shape that is true at ``index`` of the last dimension."""
    return torch.arange(like.shape[-1], device=like.device) == index.unsqueeze(-1)
