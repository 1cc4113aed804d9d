"""CAGrad (Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning").

The update is the vector in a ball around the mean gradient g₀ whose least dot product with a task's gradient is the
largest: max_d min_i g_iᵀd over ‖d - g₀‖ <= c‖g₀‖. With c < 1 it still lowers the mean of the losses, and the task that
gains the least gains as much as that allows. The paper finds it as d = g₀ + c‖g₀‖ g_w / ‖g_w‖ from the weights w on the
simplex that minimise g_wᵀg₀ + c‖g₀‖ ‖g_w‖.
"""

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import Array, carried
from gradkern.aggregators.solvers.ball import best_in_ball
from gradkern.aggregators.solvers.scaling import mean_weights
from gradkern.arguments import boolean, number


class CAGrad(GramianMethod):
    """CAGrad of Liu et al. 2021: the vector near the mean gradient with the largest least gain of a task.

    A gradient of zero counts in the mean, and not among the gains. If the hull of the gradients contains 0, no vector
    lowers all losses. Several vectors may be best then, and the weights may be large and nearly cancel.

    A single task gets the weight 1 + c, or (1 + c) / (1 + c²) if rescaled. TorchJD does not rescale, has no default of
    c, and gives an update of zero if ‖g_w‖ is less than 1e-4 of the gradients' lengths.

    Args:
        c: the radius of the ball relative to the mean gradient's length, at least 0, which gives the mean; the paper's
            convergence holds for less than 1.
        rescale: whether the update is divided by 1 + c², as in the authors' code.
    """

    def __init__(self, c: float = 0.5, rescale: bool = True) -> None:
        super().__init__()
        self.c = number("c", c, least=0)
        self.rescale = boolean("rescale", rescale)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _cagrad(M, present, self.c, 1 / (1 + self.c * self.c) if self.rescale else 1.0)

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c}, rescale={self.rescale})"


@carried
def _cagrad(M: Array, among: Array | None, c: float, scale: float) -> Array:
    mean = mean_weights(M, among)
    return (mean + best_in_ball(M, mean, c, among)) * scale
