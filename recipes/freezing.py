"""Gradual unfreezing: layers are frozen and unfrozen between steps.

Set ``requires_grad``, nothing else. A frozen layer gets no gradient, so the optimizer skips it, including weight decay
and momentum. Groups are numbered over all parameters, including frozen ones. GradVac's targets therefore stay with
their layer, and do not change while it is frozen.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Return the model and the optimizer, which gets all parameters, including those that are frozen at first."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    return model, gk.SurgeryOptimizer(inner, gk.GradVac(), groups="module")


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor) -> gk.SurgeryInfo:
    """Take one step, whichever layers are frozen."""
    opt.zero_grad()  # sets .grad to None, so that no earlier gradient moves a layer frozen since then
    info = opt.backward(task_losses(model(x), y))
    opt.step()
    return info


def main() -> None:
    """Train for 40 steps; the first layer is frozen for the first 20."""
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
