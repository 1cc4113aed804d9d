"""Small multi-task models, and the task gradients of their losses, computed one by one by torch itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MultiHead(nn.Module):
    """Model of the usual shape in multi-task learning: a trunk and one head per task."""

    def __init__(self, n_tasks: int = 3, width: int = 10) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(n_tasks))

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return one loss per task from one pass through the trunk."""
        h = self.trunk(x)
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y, strict=True)]

    def loss(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of task t from a forward pass of its own."""
        return (self.heads[t](self.trunk(x)).squeeze(-1) - y[t]).square().mean()


def problem(n_tasks: int = 3, device: torch.device | str = "cpu") -> tuple[MultiHead, Tensor, Tensor]:
    """Return a model, inputs (16, 6) and targets (n_tasks, 16) that pull the trunk in different directions."""
    torch.manual_seed(0)
    with torch.device(device):
        return MultiHead(n_tasks), torch.randn(16, 6), 3 * torch.randn(n_tasks, 16)


def task_gradients(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Return grads[t][k] from torch.autograd.grad. The graphs are kept."""
    return [list(torch.autograd.grad(loss, list(params), retain_graph=True, allow_unused=True)) for loss in losses]


def flat(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Return the gradients as one float64 vector on the CPU, with zeros for missing ones."""
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
    return torch.cat([part.detach().reshape(-1).double().cpu() for part in parts])
