"""What other projects do, told from their published behaviour on explicit vectors: what compat is compared with."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


class PCGrad:
    """WeiChengTseng/Pytorch-PCGrad: heads are in the vectors, and ``reduction`` is read but never obeyed."""

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


def task_gradient(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter, None where the loss does not reach it; the graph is kept."""
    trained = [p for p in params if p.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True), strict=True))
    return [found.get(p) for p in params]


def shuffled_projections(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Each task in turn shuffles the one list of all original vectors, its own among them, and visits all of it."""
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
    """All gradients one after another, zeros where there is none."""
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, params, strict=True)]
    )


def pieces(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """``v`` cut into tensors of the shapes of ``params``."""
    return [part.view(p.shape).clone() for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
