"""MoDo, multi-objective gradient with double sampling (Chen et al. 2023, "Three-Way Trade-Off in Multi-Objective
Learning: Optimization, Generalization and Conflict-Avoidance").

The weights move toward those of MGDA: λ ← Π(λ - γ (M + ρI) λ), with M = J1 J2ᵀ and Π the projection onto the simplex.
"""

from gradkern.aggregators.history.double import DoubleSampling
from gradkern.aggregators.solvers.arrays import Array
from gradkern.aggregators.solvers.simplex import on_simplex
from gradkern.arguments import number


class MoDo(DoubleSampling):
    """MoDo of Chen et al. 2023: weights that move slowly toward MGDA's, along the gradients of two batches.

    Weights move by γ times the dot products, so losses should be scaled such that squared lengths of gradients are not
    far from 1. A gradient scaler that scales the losses of both batches scales that step by its square.

    The paper's update is of both batches' gradients, and LibMTL's of a third batch; here it is of the first batch's.
    The defaults are those of TorchJD 0.18; LibMTL's γ is 0.001. See :class:`DoubleSampling` for what is kept.

    Args:
        gamma: γ, the rate of the weights, at least 0.
        rho: ρ, the regularization of the weights, at least 0.
    """

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = number("gamma", gamma, least=0)
        self.rho = number("rho", rho, least=0)

    def moved(self, M: Array, w: Array, there: Array | None) -> Array:
        """Return the weights after a step; see :meth:`DoubleSampling.moved`."""
        slope = (M @ w[..., None])[..., 0] + self.rho * w
        return on_simplex(w - self.gamma * slope, there)

    def __repr__(self) -> str:
        return f"MoDo(gamma={self.gamma}, rho={self.rho})"
