"""A task that is missing from a step: its entry in the losses is None, because a task is identified by its position.

Without memory, surgery modifies the other tasks against each other only. With ``memory=True`` it also modifies them
against the missing task's last gradient, which itself is not added. The missing task's head stays unchanged either way.
"""

from collections.abc import Sequence

import torch
from tasks import Model, batches
from torch import Tensor, nn

import gradkern as gk


def build(memory: bool) -> tuple[Model, gk.SurgeryOptimizer]:
    """Return the model and the optimizer."""
    torch.manual_seed(0)
    model = Model()
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    # Without shared=, no parameter would count as shared before two tasks have been seen.
    return model, gk.SurgeryOptimizer(inner, gk.PCGrad(), shared=model.trunk, memory=memory)


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Sequence[Tensor | None]) -> gk.SurgeryInfo:
    """Take one step; some targets may be None."""
    predictions = zip(model(x), y, strict=True)
    opt.zero_grad()
    info = opt.backward([None if target is None else nn.functional.mse_loss(p, target) for p, target in predictions])
    opt.step()
    return info


def main() -> None:
    """Train with targets of task 2 in every fifth batch only."""
    conflicts = {}
    for memory in (False, True):
        model, opt = build(memory)
        conflicts[memory] = 0
        for step, (x, y) in enumerate(batches(50)):
            info = train_step(model, opt, x, [y[0], y[1], y[2] if step % 5 == 0 else None])
            conflicts[memory] += int(info.conflicts[:2, 2].sum())
    print(f"conflicts of the others with task 2: {conflicts[False]} without memory, {conflicts[True]} with it")


if __name__ == "__main__":
    main()
