"""Gradient accumulation: one step from several micro-batches, equal to a step from one big batch.

Within ``accumulate`` the gradients of each task add up, and surgery sees their sums. Surgery on each micro-batch would
react to the noise of small batches instead, and the sum of its results would be a different update.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk

MICRO_BATCHES = 4


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Return the model and the optimizer."""
    torch.manual_seed(0)
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad(order=range(3)))
    return model, opt


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor) -> gk.SurgeryInfo:
    """Take one step, with the activations of a quarter of the batch at a time."""
    opt.zero_grad()
    with opt.accumulate() as total:
        for part, targets in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES, dim=1), strict=True):
            opt.backward([loss / MICRO_BATCHES for loss in task_losses(model(part), targets)])
    opt.step()
    return total.info


def main() -> None:
    """Train for fifty steps."""
    model, opt = build()
    for x, y in batches(50):
        info = train_step(model, opt, x, y)
    print(f"losses {info.losses.tolist()} after 50 steps of {MICRO_BATCHES} micro-batches")


if __name__ == "__main__":
    main()
