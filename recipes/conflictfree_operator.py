"""conflictfree, the library of ConFIG: its ``PCGradOperator`` on gradkern.

A training loop changes only the line that makes the operator. This operator visits the tasks in their given order, like
conflictfree's own. The paper draws a random order, as ``gk.PCGrad()`` does.
"""

from collections.abc import Sequence
from functools import cache

import conflictfree.grad_operator
import torch
from conflictfree.grad_operator import GradientOperator
from conflictfree.utils import apply_gradient_vector, get_gradient_vector
from torch import Tensor, nn

import gradkern as gk


@cache
def in_order(n_tasks: int) -> gk.PCGrad:
    """Return the aggregator, made once: checking an order takes longer than the surgery of a small network."""
    return gk.PCGrad(order=range(n_tasks))


class PCGradOperator(GradientOperator):
    """Replacement for ``conflictfree.grad_operator.PCGradOperator``; ``update_gradient`` is inherited."""

    def calculate_gradient(self, grads: Tensor | Sequence[Tensor], losses: Sequence[Tensor] | None = None) -> Tensor:
        """Return the update (P,) from T gradients of P numbers each."""
        J = grads if isinstance(grads, Tensor) else torch.stack(grads)
        return in_order(len(J))(J)


class MultiTask(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def loss(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        """Return task t's loss from inputs (n, 6) and targets (n, 3)."""
        return (self.heads[t](self.trunk(x)).squeeze(-1) - y[:, t]).square().mean()


def train(operator: GradientOperator, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Train with a typical conflictfree loop; return the sum of the losses before each step."""
    torch.manual_seed(0)
    model = MultiTask().to(x.dtype)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(steps):
        grads, total = [], 0.0
        for t in range(3):
            opt.zero_grad()
            loss = model.loss(t, x, y)
            loss.backward()
            grads.append(get_gradient_vector(model, none_grad_mode="zero"))  # the other heads have no gradient
            total += loss.item()
        # update_gradient would not work here, because it assumes that each loss reaches all parameters.
        apply_gradient_vector(model, operator.calculate_gradient(grads), none_grad_mode="zero")
        opt.step()
        history.append(total)
    return history


def main() -> None:
    """Train with both operators, and print the final losses of both."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    y = torch.stack([a, b, -a], 1)
    ours, theirs = (train(o, x, y, 200) for o in (PCGradOperator(), conflictfree.grad_operator.PCGradOperator()))
    print(f"200 steps, sum of losses {ours[0]:.2f} -> {ours[-1]:.2f}; {theirs[-1]:.2f} by conflictfree's own operator")


if __name__ == "__main__":
    main()
