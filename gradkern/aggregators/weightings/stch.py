"""STCH, smooth Tchebycheff scalarization (Lin et al. 2024)."""

from typing import ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.scales import check_positive
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.aggregators.weightings.state import StatefulWeighting
from gradkern.arguments import integer, number


class STCH(StatefulWeighting):
    """Smooth Tchebycheff scalarization of Lin et al. 2024: it minimises a smooth maximum of the logarithms of losses.

    In the first ``warmup`` steps it minimises Σ log L_i, and takes the mean of each loss as its nadir z_i. Then it
    minimises T μ log Σ exp(log(L_i / z_i) / μ), over the T present tasks, so loss i has the weight
    T softmax(log(L / z) / μ)_i / L_i. A task without a loss in the warm-up has its own loss for z_i. The official code
    takes the means over the last epoch of the warm-up, not over all of it.

    All losses are computed before the backward pass. They must be above 0: another one raises ValueError on a CPU, and
    elsewhere gives NaN weights. A step whose losses are not finite leaves the state as it is. Weights grow as losses
    shrink, so with a gradient scaler call ``update(scaler=)``, in which methods see the losses without the scale.
    Scaled losses, as ``backward`` sees them, give updates that are too small by the scale.

    Args:
        mu: μ, above 0; as it nears 0, only the largest L_i / z_i counts.
        warmup: the number of steps that z is a mean of, 1 or more.
        report: as for :class:`Scalarization`.

    Attributes:
        table: (3, T) float64: the sums and the numbers of the losses in the warm-up, and the number of its steps. None
            before the first step.
    """

    needs_losses = True
    weighs_known_losses = True
    FIRST: ClassVar = {"sums": 0.0, "counts": 0.0, "steps": 0.0}

    def __init__(self, mu: float = 1, warmup: int = 100, report: bool = False) -> None:
        super().__init__(None, report)
        self.mu = number("mu", mu, above=0)
        self.warmup = integer("warmup", warmup, least=1)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the derivatives of the objective."""
        losses = tasks.known()
        check_positive(losses, "STCH takes their logarithms")
        rows = self._rows(tasks.count, tasks.device)
        ratios = torch.where(rows["counts"] > 0, losses * rows["counts"] / rows["sums"], losses / losses)
        smooth = tasks.n_present() * tasks.softmax(ratios.log() / self.mu)
        return torch.where(rows["steps"] < self.warmup, torch.where(losses > 0, 1.0, torch.nan), smooth) / losses

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Add the losses of the warm-up to the means."""
        rows = self._rows(tasks.count, tasks.device)
        present = torch.ones_like(rows["sums"]) if tasks.present is None else tasks.present.double()
        losses = tasks.among_present(tasks.known(), 1.0)
        new = {
            "sums": rows["sums"] + losses * present,
            "counts": rows["counts"] + present,
            "steps": rows["steps"] + 1,
        }
        warming = (rows["steps"] < self.warmup).all()
        self._move(new, tasks.finite() & warming & (losses > 0).all())
        return ()

    def __repr__(self) -> str:
        return self._repr_of(f"mu={self.mu}", f"warmup={self.warmup}")
