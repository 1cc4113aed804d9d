"""GradNorm (Chen et al. 2018)."""

from typing import ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.aggregators.weightings.state import StatefulWeighting
from gradkern.arguments import integer, number

LEAST = 1e-3
"""The least weight before the weights are scaled to their sum. A weight below 0 would raise its task's loss."""


class GradNorm(StatefulWeighting):
    """GradNorm of Chen et al. 2018: it brings the lengths of the weighted task gradients together.

    Loss i has the weight w_i, a number of the method's own state, 1 at first. After each step w moves against the
    gradient of Σ |w_i n_i − G r_i^α|: n_i is the length of task gradient i over the shared parameters, G the mean of
    w_j n_j, and r_i the ratio L_i / (first L_i), divided by the mean of these ratios; G and r count as constants. Then
    w is scaled to the sum that it had, T. A step whose numbers are not finite leaves w as it is.

    The lengths come from the Gramian, so a step takes one backward pass for each task besides its own, and memory for T
    gradients; ``info`` has the norms, cosines and conflicts. The paper takes the lengths over the last shared layer:
    name it by ``shared=``, since it is far shorter than all shared parameters. The steps of w grow with the lengths, so
    with a gradient scaler call ``SurgeryOptimizer.update(scaler=)``, which shows them without its scale.

    Args:
        T: the number of tasks.
        alpha: α, how strongly tasks that learn slowly are preferred; 0 or more. 0 makes all lengths equal.
        lr: the learning rate of w, above 0, for plain gradient descent.
        report: as for :class:`Scalarization`. The Gramian is computed in any case.

    Attributes:
        table: (2, T) float64: w, and the first finite loss of each task, NaN before it.
    """

    needs_losses = True
    needs_gramian = True
    FIRST: ClassVar = {"weights": 1.0, "first": torch.nan}

    def __init__(self, T: int, alpha: float = 1.5, lr: float = 0.025, report: bool = False) -> None:
        super().__init__(integer("T", T, least=1), report)
        self.alpha = number("alpha", alpha, least=0)
        self.lr = number("lr", lr, above=0)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return w as the steps before have left it."""
        return self._rows(tasks.count, tasks.device)["weights"].clone()

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Move w by the lengths and the losses of this step."""
        rows = self._rows(tasks.count, tasks.device)
        assert tasks.squares is not None, "it has the Gramian"
        w, losses, n, count = rows["weights"], tasks.known(), tasks.squares.sqrt(), tasks.n_present()
        first = torch.where(rows["first"].isnan(), losses, rows["first"])
        ratios = losses / first
        r = ratios / (tasks.among_present(ratios, 0.0).sum() / count)
        target = tasks.among_present(w * n, 0.0).sum() / count * r**self.alpha
        moved = (w - self.lr * n * torch.sign(w * n - target)).clamp(min=LEAST)
        moved = moved * tasks.among_present(w, 0.0).sum() / tasks.among_present(moved, 0.0).sum()
        new = {"weights": tasks.among_present(moved, w), "first": tasks.among_present(first, rows["first"])}
        self._move(new, new["weights"].isfinite().all() & tasks.finite())
        return ()

    def __repr__(self) -> str:
        return self._repr_of(f"T={self.T}", f"alpha={self.alpha}", f"lr={self.lr}")
