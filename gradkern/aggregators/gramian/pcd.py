"""PCD, priority-constrained descent ("Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
Multi-Objective Optimization", 2026).

The first task is the primary one. Its gradient changes as little as possible so that every other task gains at least
the share τ of what a step along its own gradient would give it. With rows ĝ_i = g_i / √v_i, where v_i is a running mean
of ‖g_i‖² without bias, it is to minimise ‖d - ĝ_0‖ over ĝ_jᵀd >= τ‖ĝ_j‖². The update is d, made as long as g_0.

The best d is ĝ_0 + Σ_j μ_j ĝ_j with μ >= 0, where μ_j > 0 only if task j gains no more than it must.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import Solution, check_gramian, in_dtype
from gradkern.aggregators.solvers.active_set import nonnegative
from gradkern.aggregators.solvers.arrays import Array, carried, identity, space
from gradkern.aggregators.solvers.scaling import scaled
from gradkern.aggregators.task_state import TaskState
from gradkern.arguments import number

MOST = 1e9
"""The sum of the multipliers of unit rows up to which constraints count as possible to meet together."""


class PCD(TaskState):
    """Priority-constrained descent: the first task's gradient, changed so that the other tasks gain enough.

    The running means are state: each call is a step, and ``state_dict`` contains them. A step in which a dot product is
    not finite changes none, because a gradient scaler will skip it. An absent task's mean waits, and its gradient is no
    constraint. The first task must be present in every step. Groups may be added later.

    The update is zero if the first task's gradient is zero. It is that gradient if no vector meets all constraints, or
    only with multipliers above 1e9 (8e5 for a Gramian in float32): if two other tasks' gradients are antiparallel. A
    gradient of zero is no constraint.

    TorchJD adds 1e-8 to the running means, so that it treats short gradients unlike long ones.

    Args:
        tau: τ, the share of its own progress that each other task is to have, from 0 to 1.
        beta: the share of a running mean that a step keeps, at least 0 (the present gradients alone) and below 1.

    Attributes:
        means: (S, T) float64, β-weighted sums of ‖g_i‖² for each group and task; None before the first step.
        counts: (S, T) float64, the sums of their weights, 1 - β^k after k steps. A mean is the quotient of both.
    """

    kept = ("means", "counts")
    required = (0,)
    uses_memory = False
    means: Tensor | None
    counts: Tensor | None

    def __init__(self, tau: float = 0.02, beta: float = 0.999) -> None:
        super().__init__()
        self.tau = number("tau", tau, least=0, most=1)
        self.beta = number("beta", beta, least=0, below=1)

    def weights(self, M: Tensor) -> Tensor:
        """Return the weights of the task gradients in the update, and move the running means by one step.

        Args:
            M: (..., T, T), as for :meth:`Aggregator.weights`. Each leading dimension is a group with means of its own.
        """
        check_gramian(M)
        T = M.shape[-1]
        return self.solution(M.reshape(M.shape[:-2].numel(), T, T), None).weights.view(M.shape[:-1])

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the weights of the present tasks, whose running means move; see :meth:`Aggregator.solution`."""
        check_gramian(M)
        means, counts = (self._kept_for(name, M, 0.0) for name in self.kept)
        w, means, counts = _step(M, means, counts, present, self.beta, self.tau, 10 * torch.finfo(M.dtype).eps)
        self._keep("means", M, means)
        self._keep("counts", M, counts)
        return Solution(in_dtype(w, M))

    def __repr__(self) -> str:
        return f"PCD(tau={self.tau}, beta={self.beta})"


@carried
def _step(
    M: Array, means: Array, counts: Array, among: Array | None, beta: float, tau: float, precision: float
) -> tuple[Array, Array, Array]:
    """Return the weights (S, T), and ``means`` and ``counts`` after the step."""
    xp = space(M)
    new_means = beta * means + (1 - beta) * M.diagonal(0, -2, -1)
    new_counts = beta * counts + (1 - beta)
    if among is None:
        moves = xp.isfinite(M.sum())
    else:
        moves = among & xp.isfinite(xp.where(among[..., None] & among, M, 0.0).sum())
    w = constrained(M, among, xp.sqrt(new_means / new_counts), tau, precision)
    return w, xp.where(moves, new_means, means), xp.where(moves, new_counts, counts)


def constrained(M: Array, among: Array | None, lengths: Array, tau: Array | float, precision: float) -> Array:
    """Return the weights (..., T) of a step.

    Args:
        M: (..., T, T), Gramians.
        among: (T,) bool, the tasks that are present; None for all.
        lengths: (..., T), running means of the rows' lengths.
        tau: the share of its own progress that each other task is to have, a number or (T,).
        precision: the relative precision of M's entries.

    In the scale of unit rows, with r_i = n_i / √v_i and v_0 = r_0, the vector is Σ_i v_i g_i / n_i, and the constraints
    are (Kv)_j >= τ r_j.
    """
    xp = space(M)
    K, n, rows, _ = problem = scaled(M, among)
    first = identity(M)[0] > 0
    others = rows & ~first
    relative = xp.where(rows, n / xp.where(lengths > 0, lengths, n), 0.0)
    primary = relative[..., :1]
    slack = xp.where(others, K[..., 0] * primary - tau * relative, 0.0)
    both = others[..., None] & others[..., None, :]
    v = nonnegative(xp.where(both, K, identity(K)), slack)
    size = primary + xp.amax(tau * relative, -1)[..., None]
    possible = v.sum(-1)[..., None] <= min(MOST, 1 / precision) * size
    v = xp.where(possible, v, 0.0) + xp.where(first, relative, 0.0)
    square, total = (v * (K @ v[..., None])[..., 0]).sum(-1)[..., None], v.sum(-1)[..., None]
    length = xp.where(M[..., 0, :1] > 0, n[..., :1], 0.0)
    return problem.weights(v * xp.where(square > precision * total * total, length / square**0.5, 0.0))
