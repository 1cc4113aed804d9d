"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine Learning with Adversaries").

The score of a task is the sum of the squared distances of its gradient to the T - n_byzantine - 2 closest others. The
update is the mean of the gradients with the lowest scores.
"""

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import Array, ascending, carried, lowest, positions, space
from gradkern.arguments import integer


class Krum(GramianMethod):
    """Krum of Blanchard et al. 2017: the mean of the gradients that are closest to the others.

    Of equal scores the first counts. With ``n_byzantine`` = T - 3 a score is one distance, which the closest two
    gradients share, so only ``n_selected=2`` chooses without regard to the order of the tasks. Distances come from the
    Gramian, ‖g_i - g_j‖² = M_ii + M_jj - 2 M_ij, so those far shorter than the gradients are rounding. Absent tasks are
    left out: if fewer than ``n_byzantine`` + 3 are present, a score is the distance to the one closest gradient, and if
    fewer than ``n_selected`` are, all of them are selected.

    TorchJD sums distances, and the paper, as here, their squares.

    Args:
        n_byzantine: the number of tasks that may be arbitrarily wrong, at least 0. A Gramian must be of
            ``n_byzantine`` + 3 tasks at least.
        n_selected: the number of gradients in the mean, at least 1. A Gramian must be of as many tasks at least.
    """

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = integer("n_byzantine", n_byzantine, 0)
        self.n_selected = integer("n_selected", n_selected, 1)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        T = M.shape[-1]
        if self.n_byzantine + 3 > T:
            raise ValueError(f"n_byzantine must be at most T - 3 = {T - 3} for {T} tasks, got {self.n_byzantine}")
        if self.n_selected > T:
            raise ValueError(f"n_selected must be at most T = {T}, got {self.n_selected}")
        return _central(M, present, self.n_byzantine, self.n_selected)

    def __repr__(self) -> str:
        return f"Krum(n_byzantine={self.n_byzantine}, n_selected={self.n_selected})"


@carried
def _central(M: Array, among: Array | None, n_byzantine: int, n_selected: int) -> Array:
    xp = space(M)
    square = M.diagonal(0, -2, -1)
    distances = (square[..., None] + square[..., None, :] - 2 * M).clip(0)
    n_closest = M.shape[-1] - n_byzantine - 2
    if among is None:
        # The distance to itself, 0, is the first of all.
        score = ascending(distances)[..., : n_closest + 1].sum(-1)
        w = xp.ones_like(score) * lowest(score, n_selected)
        return w / n_selected + (0.0 * M).sum((-2, -1))[..., None]
    pairs = among[..., None] & among[..., None, :]
    near = ascending(xp.where(pairs, distances, xp.inf))
    n_closest = (n_closest - (~among).sum(-1)).clip(1)[..., None]
    score = xp.where((positions(square) <= n_closest) & (near < xp.inf), near, 0.0).sum(-1)
    w = xp.ones_like(score) * (among & lowest(xp.where(among, score, xp.inf), n_selected))
    return w / w.sum(-1)[..., None].clip(1) + xp.where(pairs, 0.0 * M, 0.0).sum((-2, -1))[..., None]
