"""SDMGrad, stochastic direction-oriented multi-objective gradient descent (Xiao et al. 2023, "Direction-oriented
Multi-objective Learning: Simple and Provable Stochastic Algorithms").

The weights go down ½ ‖J (w + λ/T)‖² on the simplex, in steps of projected gradient descent with momentum along
M (w + λ/T) with M = J1 J2ᵀ, and the update is of w + λ/T over 1 + λ. So it is drawn toward the mean gradient.
"""

import torch
from torch import Tensor

from gradkern.aggregators.history.double import DoubleSampling
from gradkern.aggregators.history.moco import on_simplex
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

    def moved(self, M: Tensor, w: Tensor, there: Tensor) -> Tensor:
        """Return the weights after a step; see :meth:`DoubleSampling.moved`."""
        count = there.sum(-1, keepdim=True)
        s = M.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().sum(-1, keepdim=True) / count
        s = s.unsqueeze(-1)
        M = torch.where(s > 0, M / s / s, 0.0)
        toward = self._toward_mean(there)
        velocity = torch.zeros_like(w)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + torch.einsum("sij,sj->si", M, w + toward)
            w = on_simplex(w - self.lr * velocity, there)
        return w

    def of_update(self, w: Tensor, there: Tensor) -> Tensor:
        """Return w + λ/T over 1 + λ; see :meth:`DoubleSampling.of_update`."""
        return (w + self._toward_mean(there)) / (1 + self.lamb)

    def _toward_mean(self, there: Tensor) -> Tensor:
        """Return λ/T for the present tasks, T of them, and 0 for others."""
        return self.lamb * there.double() / there.sum(-1, keepdim=True)

    def __repr__(self) -> str:
        return f"SDMGrad(lamb={self.lamb}, lr={self.lr}, momentum={self.momentum}, n_iter={self.n_iter})"
