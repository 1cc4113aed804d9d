"""Gradual unfreezing: layers are frozen and unfrozen between steps.

``requires_grad`` is all there is to set. A frozen layer gets no gradient, so that the optimizer leaves it alone, decay
and momentum included. The groups are numbered over all parameters, frozen ones too: GradVac's targets of one layer
never become those of another, and wait while it is frozen.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Model and optimizer: all parameters go in, also those that are frozen at first."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    return model, gk.SurgeryOptimizer(inner, gk.GradVac(), groups="module")


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor) -> gk.SurgeryInfo:
    """One step, whatever is frozen."""
    opt.zero_grad()  # to None, so that no gradient of before moves what has been frozen since
    info = opt.backward(task_losses(model(x), y))
    opt.step()
    return info


def main() -> None:
    """The first layer is frozen for 20 steps."""
    model, opt = build()
    before = model.trunk[0].weight.clone()
    model.trunk[0].requires_grad_(False)
    for step, (x, y) in enumerate(batches(40)):
        if step == 20:
            moved = (model.trunk[0].weight - before).abs().max()
            model.trunk[0].requires_grad_(True)
        train_step(model, opt, x, y)
    moved_since = (model.trunk[0].weight - before).abs().max()
    print(f"the first layer moved by {moved:g} in 20 frozen steps and by {moved_since:.2g} in 20 more")


if __name__ == "__main__":
    main()
