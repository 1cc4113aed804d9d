"""RLW, random loss weighting (Lin et al. 2022)."""

import torch
from torch import Tensor

from gradkern.aggregators.weightings.scalarization import Scalarization, Tasks


class RLW(Scalarization):
    """Random loss weighting of Lin et al. 2022: weights are the softmax of normal draws, new in each step.

    They sum to 1 over the present tasks.

    Args:
        generator: the source of the draws, on the losses' device; None for that device's default one. Its state is part
            of ``state_dict``.
        report: as for :class:`Scalarization`.
    """

    def __init__(self, generator: torch.Generator | None = None, report: bool = False) -> None:
        super().__init__(report, generator)

    def weigh(self, tasks: Tasks) -> Tensor:
        """Return the softmax of T normal draws."""
        generator, device = self.generator, tasks.device
        if generator is not None and generator.device != device and device.type != "meta":
            raise ValueError(f"generator is on {generator.device}, the losses on {device}")
        drawn_by = None if device.type == "meta" else generator
        return tasks.softmax(torch.randn(tasks.count, generator=drawn_by, dtype=torch.float64, device=device))

    def __repr__(self) -> str:
        return self._repr_of()
