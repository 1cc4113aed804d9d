"""Clipping the gradient norm, in two ways that train the same parameters.

Between ``backward`` and ``step``, as ever: what is clipped is the combination of the task gradients. Or in one with
the step: around ``gradkern.optim.AdamW``, ``update`` learns the norm from the weights and the Gramian, and writes no
``.grad``.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk

MAX_NORM = 0.9


def by_hand(n: int) -> tuple[Model, list[Tensor]]:
    """The model after n steps with clip_grad_norm_, and each step's norm before it was cut."""
    torch.manual_seed(0)
    model, norms = Model(), []
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters()), gk.PCGrad())
    for x, y in batches(n):
        opt.zero_grad()
        opt.backward(task_losses(model(x), y))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        opt.step()
    return model, norms


def in_one(n: int) -> tuple[Model, list[Tensor]]:
    """The same by ``update``."""
    torch.manual_seed(0)
    model, norms = Model(), []
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters()), gk.PCGrad())
    for x, y in batches(n):
        info = opt.update(task_losses(model(x), y), max_norm=MAX_NORM)
        norms.append(info.total_norm)
    return model, norms


def main() -> None:
    """Fifty steps in either way."""
    (a, norms), (b, _) = by_hand(50), in_one(50)
    apart = max((p - q).abs().max() for p, q in zip(a.parameters(), b.parameters(), strict=True))
    clipped = sum(norm > MAX_NORM for norm in norms)
    print(f"{clipped} of 50 steps were clipped; the two ways' parameters differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
