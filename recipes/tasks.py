"""The model and data of the recipes: three small regression tasks whose gradients conflict on a common trunk."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """A trunk that the tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each task's prediction, (B,), from x, (B, 8).

        The result is a list: if it were a stacked tensor, every loss would reach every head.
        """
        h = self.trunk(x)
        return [head(h).squeeze(-1) for head in self.heads]


def task_losses(predictions: list[Tensor], y: Tensor) -> list[Tensor]:
    """Return one loss per task."""
    return [nn.functional.mse_loss(p, target) for p, target in zip(predictions, y, strict=True)]


def batches(n: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Yield n batches of inputs (32, 8) and targets (3, 32), the same in every run."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 8, generator=generator)
    directions[1] -= directions[0]
    for _ in range(n):
        x = torch.randn(32, 8, generator=generator)
        yield x.to(device), torch.sin(directions @ x.T).to(device)
