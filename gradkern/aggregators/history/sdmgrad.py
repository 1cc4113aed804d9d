"""SDMGrad, stochastic direction-oriented multi-objective gradient descent (Xiao et al. 2023, "Direction-oriented
Multi-objective Learning: Simple and Provable Stochastic Algorithms").

The weights go down ½ ‖J (w + λ/T)‖² on the simplex, in steps of projected gradient descent with momentum along
M (w + λ/T) with M = J1 J2ᵀ, and the update is of w + λ/T over 1 + λ. So it is drawn toward the mean gradient.
"""

from gradkern.aggregators.history.double import DoubleSampling
from gradkern.aggregators.solvers.arrays import Array, space
from gradkern.aggregators.solvers.scaling import mean_weights
from gradkern.aggregators.solvers.simplex import on_simplex
from gradkern.arguments import integer, number


class SDMGrad(DoubleSampling):
    """SDMGrad of Xiao et al. 2023: the shortest vector near the mean gradient, along the gradients of two batches.

    M is divided by the square of s, the mean of √max(M_ii, 0), before the weights move, so that the scale of the losses
    does not matter. The official code and TorchJD 0.18 add 1e-8 to s²; here nothing is added, and where s is 0 the
    weights stay. The defaults are TorchJD's. LibMTL has a rate of 5. Both take the update of a third batch's
    gradients; here it is of the first batch's. See :class:`DoubleSampling` for what is kept.

    Args:
        lamb: λ, how strongly the update is drawn toward the mean gradient, at least 0.
        lr: the rate of the weights, above 0.
        momentum: of the weights' descent within a step, at least 0 and below 1.
        n_iter: the number of iterations in a step, at least 1.
    """

    def __init__(self, lamb: float = 0.3, lr: float = 10.0, momentum: float = 0.5, n_iter: int = 20) -> None:
        super().__init__()
        self.lamb = number("lamb", lamb, least=0)
        self.lr = number("lr", lr, above=0)
        self.momentum = number("momentum", momentum, least=0, below=1)
        self.n_iter = integer("n_iter", n_iter, 1)

    def moved(self, M: Array, w: Array, there: Array | None) -> Array:
        """Return the weights after a step; see :meth:`DoubleSampling.moved`."""
        xp = space(M)
        share = mean_weights(w, there)
        s = (xp.sqrt(M.diagonal(0, -2, -1).clip(0)) * share).sum(-1)[..., None, None]
        M = xp.where(s > 0, M / s / s, 0.0)
        toward = self.lamb * share
        velocity = 0.0 * w
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + (M @ (w + toward)[..., None])[..., 0]
            w = on_simplex(w - self.lr * velocity, there)
        return w

    def of_update(self, w: Array, there: Array | None) -> Array:
        """Return w + λ/T over 1 + λ; see :meth:`DoubleSampling.of_update`."""
        return (w + self.lamb * mean_weights(w, there)) / (1 + self.lamb)

    def __repr__(self) -> str:
        return f"SDMGrad(lamb={self.lamb}, lr={self.lr}, momentum={self.momentum}, n_iter={self.n_iter})"
