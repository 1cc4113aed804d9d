"""Clipping the gradient norm, in two ways that train the same parameters.

The usual way clips between ``backward`` and ``step``, where ``.grad`` is the combination of the task gradients. The
other way clips within the step: with ``gradkern.optim.AdamW`` inside, ``update`` computes the norm from the weights and
the Gramian, and writes no ``.grad``.
"""

import torch
from tasks import Model, batches, task_losses
from torch import Tensor

import gradkern as gk

MAX_NORM = 0.9


def before_step(n: int) -> tuple[Model, list[Tensor]]:
    """Train n steps with clip_grad_norm_; return the model and each step's norm before clipping."""
    torch.manual_seed(0)
    model, norms = Model(), []
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters()), gk.PCGrad())
    for x, y in batches(n):
        opt.zero_grad()
        opt.backward(task_losses(model(x), y))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        opt.step()
    return model, norms


def within_step(n: int) -> tuple[Model, list[Tensor]]:
    """Train n steps with ``update``; return the same."""
    torch.manual_seed(0)
    model, norms = Model(), []
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters()), gk.PCGrad())
    for x, y in batches(n):
        info = opt.update(task_losses(model(x), y), max_norm=MAX_NORM)
        norms.append(info.total_norm)
    return model, norms


def main() -> None:
    """Train for fifty steps in both ways."""
    (a, norms), (b, _) = before_step(50), within_step(50)
    difference = max((p - q).abs().max() for p, q in zip(a.parameters(), b.parameters(), strict=True))
    clipped = sum(norm > MAX_NORM for norm in norms)
    print(f"{clipped} of 50 steps were clipped; the parameters of the two ways differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
