"""Models of other projects' published behaviour, on explicit vectors. The tests compare ``compat`` with them."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


class PCGrad:
    """Model of WeiChengTseng/Pytorch-PCGrad: heads are in the vectors, and ``reduction`` is read but never obeyed."""

    def __init__(self, optimizer: Optimizer, reduction: str = "mean") -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()

    def pc_backward(self, objectives: Sequence[Tensor]) -> None:
        params = tensors(self.optimizer)
        grads = [task_gradient(objective, params) for objective in objectives]
        modified = torch.stack(shuffled_projections([vector(row, params) for row in grads]))
        means, sums = pieces(modified.mean(0), params), pieces(modified.sum(0), params)
        for k, p in enumerate(params):
            reached_by_all = all(row[k] is not None for row in grads)
            p.grad = means[k] if reached_by_all else sums[k]


class PCGradAMP:
    """Model of anzeyimana/Pytorch-PCGrad-GradVac-AMP-GradAccum: scaled gradients add up.

    Entries count as shared if no task's gradient is 0 there.
    """

    def __init__(
        self,
        num_tasks: int,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        reduction: str = "sum",
    ) -> None:
        self.optimizer, self.scaler, self.reduction = optimizer, scaler, reduction
        self.params = tensors(optimizer)
        empty = vector([None] * len(self.params), self.params)
        self.rows = [empty.clone() for _ in range(num_tasks)]
        self.nonzero = [empty.bool() for _ in range(num_tasks)]

    def backward(self, mt_losses: Sequence[Tensor]) -> None:
        for t, loss in enumerate(mt_losses):
            g = vector(
                task_gradient(loss if self.scaler is None else self.scaler.scale(loss), self.params), self.params
            )
            self.rows[t] = self.rows[t] + g
            self.nonzero[t] = self.nonzero[t] | (g != 0)

    def step(self) -> None:
        modified = torch.stack(self.modified(self.rows))
        shared = torch.stack(self.nonzero).all(0)
        merged = torch.where(shared & (self.reduction == "mean"), modified.mean(0), modified.sum(0))
        for p, g in zip(self.params, pieces(merged, self.params), strict=True):
            p.grad = g
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.rows = [torch.zeros_like(row) for row in self.rows]
        self.nonzero = [torch.zeros_like(mask) for mask in self.nonzero]

    def modified(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return shuffled_projections(rows)


class GradVacAMP(PCGradAMP):
    """Model of the same project's GradVac, in the rows' own dtype. A target moves only when it corrects."""

    def __init__(
        self,
        num_tasks: int,
        optimizer: Optimizer,
        DEVICE: torch.device | str,
        scaler: torch.amp.GradScaler | None = None,
        beta: float = 1e-2,
        reduction: str = "sum",
    ) -> None:
        super().__init__(num_tasks, optimizer, scaler, reduction)
        self.beta = beta
        self.rho_T = torch.zeros(num_tasks, num_tasks)

    def modified(self, rows: Sequence[Tensor]) -> list[Tensor]:
        vaccinated = []
        for i, v in enumerate(rows):
            others = [j for j in range(len(rows)) if j != i]
            random.shuffle(others)
            for j in others:
                target = self.rho_T[i, j].clone()
                rho = torch.dot(v, rows[j]) / (v.norm() * rows[j].norm())
                if rho < target:
                    height = target * (1 - rho**2).sqrt() - rho * (1 - target**2).sqrt()
                    v = v + rows[j] * (v.norm() * height / (rows[j].norm() * (1 - target**2).sqrt()))
                    self.rho_T[i, j] = (1 - self.beta) * target + self.beta * rho
            vaccinated.append(v)
        return vaccinated


def task_gradient(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of each parameter, None where the loss does not reach it. The graph is kept."""
    trained = [p for p in params if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True), strict=True))
    return [found.get(p) for p in params]


def shuffled_projections(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Project as both originals do: each task shuffles the one list of all vectors, its own included, and visits it."""
    originals = list(vectors)
    modified = []
    for v in vectors:
        random.shuffle(originals)
        for other in originals:
            dot = torch.dot(v, other)
            if dot < 0:
                v = v - dot * other / other.norm() ** 2
        modified.append(v)
    return modified


def tensors(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def vector(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Return all gradients one after another, with zeros for missing ones."""
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, params, strict=True)]
    )


def pieces(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Cut ``v`` into tensors of the shapes of ``params``."""
    return [part.view(p.shape).clone() for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
