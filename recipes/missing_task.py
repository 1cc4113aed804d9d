"""A task that is missing from a step: its entry in the losses is None, for its position is what a task is known by.

Without memory the others are modified against each other alone. With ``memory=True`` they are modified also against the
missing task's last gradient, which itself is not added. Its head stays as it is in either case.
"""

from collections.abc import Sequence

import torch
from tasks import Model, batches
from torch import Tensor, nn

import gradkern as gk


def build(memory: bool) -> tuple[Model, gk.SurgeryOptimizer]:
    """Model and optimizer."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    # Without shared=, nothing would count as shared before two tasks have been seen.
    return model, gk.SurgeryOptimizer(inner, gk.PCGrad(), shared=model.trunk, memory=memory)


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Sequence[Tensor | None]) -> gk.SurgeryInfo:
    """One step, on targets of which some may be missing."""
    predictions = zip(model(x), y, strict=True)
    opt.zero_grad()
    info = opt.backward([None if target is None else nn.functional.mse_loss(p, target) for p, target in predictions])
    opt.step()
    return info


def main() -> None:
    """Task 2 has targets in every fifth batch."""
    conflicts = {}
    for memory in (False, True):
        model, opt = build(memory)
        conflicts[memory] = 0
        for step, (x, y) in enumerate(batches(50)):
            info = train_step(model, opt, x, [y[0], y[1], y[2] if step % 5 == 0 else None])
            conflicts[memory] += int(info.conflicts[:2, 2].sum())
    print(f"the others met a conflict with task 2 {conflicts[False]} times without memory, {conflicts[True]} with it")


if __name__ == "__main__":
    main()
