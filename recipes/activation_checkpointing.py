"""Activation checkpointing: the trunk's activations are computed anew in the backward pass, and not kept.

With ``use_reentrant=False``: the reentrant kind runs a backward pass of its own, which cannot be asked for one task's
gradients, and gradkern raises an error that says so. Each task's backward pass computes the trunk anew, so T tasks
cost T more forward passes; dropout draws the same masks in all of them.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradkern as gk


class Checkpointed(Model):
    """The model, with nothing kept between trunk and heads."""

    use_reentrant = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """Each task's prediction."""
        h = checkpoint(self.trunk, x, use_reentrant=self.use_reentrant)
        return [head(h).squeeze(-1) for head in self.heads]


def main() -> None:
    """One step, in which every pass through the trunk is counted."""
    torch.manual_seed(0)
    model, passes = Checkpointed(), []
    model.trunk.register_forward_pre_hook(lambda *_: passes.append(1))
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters()), gk.PCGrad())
    for x, y in batches(1):
        opt.zero_grad()
        opt.backward(task_losses(model(x), y))
        opt.step()
    print(f"{len(passes)} passes through the trunk in one step: 1, and 1 more in each of 3 backward passes")


if __name__ == "__main__":
    main()
