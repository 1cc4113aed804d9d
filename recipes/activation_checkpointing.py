"""Activation checkpointing: the trunk's activations are not stored but recomputed in the backward pass.

Use ``use_reentrant=False``. The reentrant kind runs its own backward pass, which cannot return one task's gradients,
and gradkern raises an error that says so. Each task's backward pass recomputes the trunk, so T tasks cost T more
forward passes of it. Dropout draws the same masks in all of them.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradkern as gk


class Checkpointed(Model):
    """The model, with activation checkpointing of the trunk."""

    use_reentrant = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each task's prediction."""
        h = checkpoint(self.trunk, x, use_reentrant=self.use_reentrant)
        return [head(h).squeeze(-1) for head in self.heads]


def main() -> None:
    """Take one step and count the passes through the trunk."""
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
