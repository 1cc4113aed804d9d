"""Gramians that are hard to solve for, in float64, by kind and by the spread of their rows' lengths."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.min_norm import min_norm
from gradkern.aggregators.solvers.scaling import scaled


def _apart(n: int, decades: float) -> Tensor:
    """Return n distances from 1 to ``10 ** -decades``."""
    return 10 ** (-decades * torch.rand(n, 1, 1, dtype=torch.float64))


def _paired(J: Tensor, sign: float, distance: Tensor | float) -> Tensor:
    """Return rows of which every second one is near the row before it, or near its opposite."""
    J[:, 1::2] = sign * J[:, : J.shape[1] - 1 : 2] + distance * J[:, 1::2]
    return J


def _along(J: Tensor) -> Tensor:
    """Return rows near one line."""
    n, T, P = J.shape
    sign = torch.where(torch.rand(n, T, 1) < 0.5, -1.0, 1.0).double()
    return sign * torch.randn(n, 1, P, dtype=torch.float64) + _apart(n, 5) * J


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda J: J,
    "common": lambda J: J + 3 * torch.randn_like(J[:, :1]),
    "antiparallel": lambda J: _paired(J, -1, 0),
    "nearly antiparallel": lambda J: _paired(J, -1, _apart(len(J), 8)),
    "equal": lambda J: _paired(J, 1, 0),
    "nearly equal": lambda J: _paired(J, 1, _apart(len(J), 8)),
    "integer": lambda J: (2 * J).round().clamp(-2, 2),
    "along a line": _along,
    "some zero": lambda J: J * (torch.rand(J.shape[:2]) < 0.7).unsqueeze(-1),
}
SPREADS = (0, 3, 6)
"""Rows are up to 10^spread times as long as 1, or as short."""
T_ALL = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 31, 40)


def gramians(kind: str, spread: int, n: int, T: int, P: int) -> Tensor:
    """Return n Gramians of T rows of P entries."""
    J = ROWS[kind](torch.randn(n, T, P, dtype=torch.float64))
    J = J * 10 ** (spread * (2 * torch.rand(n, T, 1, dtype=torch.float64) - 1))
    return J @ J.mT


def integers(n: int, T: int) -> Tensor:
    """Return n Gramians of integer rows of rank 1 to 6. Many are zero, repeated or opposite; some are 1e3 as long."""
    J = (
        torch.randint(-9, 10, (n, T, 6))
        * (torch.rand(n, T, 6) < 0.5)
        * (torch.arange(6) < torch.randint(1, 7, (n, 1, 1)))
    )
    like = J.gather(1, torch.randint(T, (n, T, 1)).expand_as(J))
    J = torch.where(torch.rand(n, T, 1) < 0.4, like * torch.randint(-1, 2, (n, T, 1)), J)
    J = J.double() * 10.0 ** (3 * torch.randint(-1, 2, (n, T, 1)) * (torch.rand(n, 1, 1) < 0.5))
    return J @ J.mT


def mixed(n: int, T: int, spreads: tuple[int, ...] = SPREADS, ranks: tuple[int, ...] = ()) -> Tensor:
    """Return n Gramians of each kind, spread and rank, one after another: low rank and full rank."""
    parts = [
        gramians(kind, spread, n, T, P)
        for kind in ROWS
        for spread in spreads
        for P in ranks or (max(1, T // 3), T, 5 * T)
    ]
    return torch.cat(parts)


def distance_of_zero(M: Tensor) -> Tensor:
    """Return the square of the distance of 0 from the hull of the unit rows (...), 0 if it is inside."""
    K = scaled(M).K
    w = carried(min_norm)(K)
    return (w * (K @ w.unsqueeze(-1)).squeeze(-1)).sum(-1)
