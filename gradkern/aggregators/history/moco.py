"""MoCo, multi-objective gradient correction (Fernando et al. 2023, "Mitigating Gradient Bias in Multi-objective
Learning: A Provably Convergent Approach", Algorithm 1).

Gradients of batches make MGDA's weights biased. MoCo tracks each task's gradient, y_i ← y_i - β_k (y_i - g_i), and
moves the weights slowly toward those of the tracked gradients' shortest vector: λ ← Π(λ - γ_k (YYᵀ + ρI) λ), the
projection onto the simplex. The update is λᵀ Y. Step sizes fall, β_k = β k^-σ and γ_k = γ k^-σ'.
"""

from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.base import Solution, all_finite, check_gramian
from gradkern.aggregators.history.averaged import Averaged
from gradkern.aggregators.solvers.simplex import on_simplex
from gradkern.arguments import number


class MoCo(Averaged):
    """MoCo of Fernando et al. 2023: tracked gradients, and weights that move toward their shortest vector.

    The tracked gradients start from 0, and the weights of each group from 1/T. Absent tasks have the weight 0 in a
    step; their own weights wait, and those of the present tasks are projected onto a simplex of their own. Weights move
    by γ times the Gramian, so losses should be scaled such that squared lengths of gradients are not far from 1.

    The authors' code differs from their algorithm: it scales each gradient to the length of its loss, and has a softmax
    in place of the projection, which keeps weights near 1/T. The default step sizes are those of that code.

    The T tracked gradients take as much memory as the T task gradients, of the shared parameters' dtype; see
    :class:`Averaged`.

    Args:
        beta: β, the rate of the tracked gradients in the first step, above 0 and at most 1.
        beta_sigma: σ, how fast it falls, at least 0.
        gamma: γ, the rate of the weights in the first step, at least 0.
        gamma_sigma: σ', how fast it falls, at least 0.
        rho: ρ, the regularization of the weights, at least 0.

    Attributes:
        task_weights: (S, T) float64, λ for each group and task; None before the first step.
        rounds: (S, T) float64, how often each has moved; None before the first step.
    """

    kept = ("task_weights", "rounds")
    task_weights: Tensor | None
    rounds: Tensor | None

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
    ) -> None:
        super().__init__()
        self.beta = number("beta", beta, above=0, most=1)
        self.beta_sigma = number("beta_sigma", beta_sigma, least=0)
        self.gamma = number("gamma", gamma, least=0)
        self.gamma_sigma = number("gamma_sigma", gamma_sigma, least=0)
        self.rho = number("rho", rho, least=0)

    def rates(self, steps: Tensor) -> Tensor:
        """Return β k^-σ for each task's k-th step; see :meth:`Averaged.rates`."""
        return self.beta * steps.clamp(min=1) ** -self.beta_sigma

    def weights(self, M: Tensor) -> Tensor:
        """Return the weights after a step from the Gramian of the tracked gradients; see :meth:`Aggregator.weights`."""
        check_gramian(M)
        S, T = M.shape[:-2].numel(), M.shape[-1]
        return self.solution(M.reshape(S, T, T), None).weights.view(M.shape[:-1])

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the present tasks' weights after this step; see :meth:`Aggregator.solution`."""
        check_gramian(M)
        before = self._kept_for("task_weights", M, 1 / M.shape[-1])
        rounds = self._kept_for("rounds", M, 0.0)
        there = torch.ones_like(before, dtype=torch.bool) if present is None else present.expand_as(before)
        both = there.unsqueeze(-1) & there.unsqueeze(-2)
        G = torch.where(both, M.detach().double(), 0.0)
        gamma = self.gamma * (rounds + 1) ** -self.gamma_sigma
        lambda_ = torch.where(there, before, 0.0)
        slope = (G @ lambda_.unsqueeze(-1)).squeeze(-1) + self.rho * lambda_
        w = on_simplex(lambda_ - gamma * slope, there)
        moves = G.isfinite().all() & there
        self._keep("task_weights", M, torch.where(moves, w, before))
        self._keep("rounds", M, rounds + moves)
        spoilt = ~all_finite(G)
        return Solution(torch.where(spoilt.unsqueeze(-1), torch.nan, w).to(M.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weights, rounds = (state_dict.get(f"{prefix}{name}") for name in self.kept)
        if (weights is None) != (rounds is None):
            raise ValueError("state_dict must hold both of task_weights and rounds, or neither")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return (
            f"MoCo(beta={self.beta}, beta_sigma={self.beta_sigma}, gamma={self.gamma}, "
            f"gamma_sigma={self.gamma_sigma}, rho={self.rho})"
        )
