"""Surgery in every k-th step, starting at a given step. All other steps are ordinary training, at its usual cost.

Both kinds of step write ``.grad`` and use the same optimizer state.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk

START, EVERY = 10, 4


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Return the model and the optimizer."""
    torch.manual_seed(0)
    model = Model()
    return model, gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad())


def train_step(model: Model, opt: gk.SurgeryOptimizer, step: int, x: Tensor, y: Tensor) -> gk.SurgeryInfo | None:
    """Take step number ``step``, counted from 0; return the info of its surgery, or None without surgery."""
    losses = task_losses(model(x), y)
    opt.zero_grad()
    info = None
    if step >= START and (step - START) % EVERY == 0:
        info = opt.backward(losses)
    else:
        sum(losses).backward()
    opt.step()
    return info


def main() -> None:
    """Train for fifty steps."""
    model, opt = build()
    infos = [train_step(model, opt, step, x, y) for step, (x, y) in enumerate(batches(50))]
    n_surgery = sum(info is not None for info in infos)
    print(f"surgery in {n_surgery} of {len(infos)} steps, from step {START} on")


if __name__ == "__main__":
    main()
