"""DWA, dynamic weight average (Liu et al. 2019)."""

from typing import ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.aggregators.weightings.state import StatefulWeighting
from gradkern.arguments import integer, number


class DWA(StatefulWeighting):
    """Dynamic weight average of Liu et al. 2019: losses that have fallen less get larger weights.

    Loss i has the weight T · softmax(r / temperature)_i with r_i = L_i(t − 1) / L_i(t − 2), over the T present tasks.
    Weights are 1 until two losses are known, and r_i is 1 where it is not finite. A step whose losses are not finite
    leaves the state as it is.

    Args:
        temperature: above 0; a larger one brings the weights closer to 1.
        every: the number of steps whose mean loss is one L_i(t). The paper takes the means over epochs.
        report: as for :class:`Scalarization`.

    Attributes:
        table: (5, T) float64: L(t − 2), L(t − 1), and of the steps since then the sums of losses, the numbers of
            losses and the number of steps. None before the first step.
    """

    needs_losses = True
    FIRST: ClassVar = {"before": torch.nan, "last": torch.nan, "sums": 0.0, "counts": 0.0, "steps": 0.0}

    def __init__(self, temperature: float = 2, every: int = 1, report: bool = False) -> None:
        super().__init__(None, report)
        self.temperature = number("temperature", temperature, above=0)
        self.every = integer("every", every, least=1)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the weights by the losses before this step."""
        rows = self._rows(tasks.count, tasks.device)
        r = rows["last"] / rows["before"]
        return tasks.n_present() * tasks.softmax(torch.where(r.isfinite(), r, 1.0) / self.temperature)

    def observe(self, tasks: Tasks) -> OwnGrads:
        """Add the losses to the running means."""
        rows = self._rows(tasks.count, tasks.device)
        present = torch.ones_like(rows["sums"]) if tasks.present is None else tasks.present.double()
        sums = rows["sums"] + tasks.among_present(tasks.known(), 0.0)
        counts, steps = rows["counts"] + present, rows["steps"] + 1
        full = steps >= self.every
        seen = full & (counts > 0)
        new = {
            "before": torch.where(seen, rows["last"], rows["before"]),
            "last": torch.where(seen, sums / counts, rows["last"]),
            "sums": torch.where(full, 0.0, sums),
            "counts": torch.where(full, 0.0, counts),
            "steps": torch.where(full, 0.0, steps),
        }
        self._move(new, tasks.finite())
        return ()

    def __repr__(self) -> str:
        return self._repr_of(f"temperature={self.temperature}", f"every={self.every}")
