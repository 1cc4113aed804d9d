"""GeometricMean, the geometric loss strategy (Chennupati et al. 2019)."""

from torch import Tensor

from gradkern.aggregators.scales import check_positive
from gradkern.aggregators.weightings.scalarization import Scalarization, Tasks


class GeometricMean(Scalarization):
    """The geometric loss strategy of Chennupati et al. 2019: it minimises the geometric mean of the losses.

    Loss i has the weight (Π_j L_j)^(1/T) / (T L_i), over the T present tasks. All losses are computed before the
    backward pass. They must be above 0: another one raises ValueError on a CPU, and elsewhere gives NaN weights.

    Args:
        report: as for :class:`Scalarization`.
    """

    needs_losses = True
    weighs_known_losses = True

    def __init__(self, report: bool = False) -> None:
        super().__init__(report)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the derivatives of the geometric mean."""
        losses = tasks.known()
        check_positive(losses, "their geometric mean takes logarithms")
        n = tasks.n_present()
        logs = losses.log()
        return ((tasks.among_present(logs, 0.0).sum() / n) - logs).exp() / n

    def __repr__(self) -> str:
        return self._repr_of()
