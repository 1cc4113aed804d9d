"""A learning-rate scheduler: a SurgeryOptimizer is a torch optimizer, so it takes any, as the one inside would."""

import math

import torch
from tasks import Model, batches, task_losses
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import gradkern as gk

N_STEPS, N_WARM_UP = 50, 10


def warm_up_then_cosine(step: int) -> float:
    """What the learning rate is multiplied by: up in a line, down in half a cosine."""
    if step < N_WARM_UP:
        return (step + 1) / N_WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (step - N_WARM_UP) / (N_STEPS - N_WARM_UP))


def build() -> tuple[Model, gk.SurgeryOptimizer]:
    """Model and optimizer."""
    torch.manual_seed(0)
    model = Model()
    return model, gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad())


def train(model: Model, opt: gk.SurgeryOptimizer, scheduler: LRScheduler) -> list[float]:
    """N_STEPS steps; the learning rate of each."""
    rates = []
    for x, y in batches(N_STEPS):
        opt.zero_grad()
        opt.backward(task_losses(model(x), y))
        opt.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return rates


def main() -> None:
    """The whole schedule."""
    model, opt = build()
    rates = train(model, opt, LambdaLR(opt, warm_up_then_cosine))
    print(f"learning rate {rates[0]:g} at first, {max(rates):g} after the warm-up, {rates[-1]:.1e} at last")


if __name__ == "__main__":
    main()
