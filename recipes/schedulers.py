"""A learning-rate scheduler: a SurgeryOptimizer is a torch optimizer, so any scheduler works on it."""

import math

import torch
from tasks import Model, batches, task_losses
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import gradkern as gk

N_STEPS, N_WARM_UP = 50, 10


def warm_up_then_cosine(step: int) -> float:
    """Return the factor of the learning rate: a linear rise, then a fall along half a cosine."""
    if step < N_WARM_UP:
        return (step + 1) / N_WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (step - N_WARM_UP) / (N_STEPS - N_WARM_UP))


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Return the model and the optimizer."""
    torch.manual_seed(0)
    model = Model()
    return model, gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad())


def train(model: Model, opt: gk.SurgeryOptimizer, scheduler: LRScheduler) -> list[float]:
    """Train for N_STEPS steps; return the learning rate of each."""
    rates = []
    for x, y in batches(N_STEPS):
        opt.zero_grad()
        opt.backward(task_losses(model(x), y))
        opt.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return rates


def main() -> None:
    """Train through the whole schedule."""
    model, opt = build()
    rates = train(model, opt, LambdaLR(opt, warm_up_then_cosine))
    print(f"learning rate {rates[0]:g} at first, {max(rates):g} after the warm-up, {rates[-1]:.1e} at the end")


if __name__ == "__main__":
    main()
