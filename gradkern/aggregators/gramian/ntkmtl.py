"""NTKMTL (Qin et al. 2025, "NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel
Perspective").

A task learns at the speed of its neural tangent kernel's eigenvalues. For one mean loss the kernel is the number M_ii,
the square of the gradient's length, and the weight (tr M / M_ii)^power brings the tasks' speeds together.
"""

from torch import Tensor

from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import Array, carried, space
from gradkern.aggregators.solvers.scaling import scaled
from gradkern.arguments import number


class NTKMTL(GramianMethod):
    """NTKMTL of Qin et al. 2025: tasks with short gradients get large weights, (tr M / M_ii)^power.

    With the default power all weighted gradients are as long as the rows' Frobenius norm. A gradient of zero is left
    out and gets the weight 0.

    Args:
        power: at least 0. 0 gives the sum of the gradients, 0.5 equally long ones.
    """

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        self.power = number("power", power, least=0)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        return _balanced(M, present, self.power)

    def __repr__(self) -> str:
        return f"NTKMTL(power={self.power})"


@carried
def _balanced(M: Array, among: Array | None, power: float) -> Array:
    xp = space(M)
    _, n, rows, failed = scaled(M, among)
    longest = xp.amax(xp.where(rows, n, 0.0), -1)[..., None]
    relative = xp.where(rows, n / longest, 0.0)
    total = (relative * relative).sum(-1)[..., None] ** 0.5
    return xp.where(rows, (total / xp.where(rows, relative, 1.0)) ** (2 * power), 0.0) + failed
