"""One encoder pass for all tasks: backward runs through each head first, then through the encoder once per task.

``features=`` names the output that the heads share. Each head's graph is freed before the next head runs. With
``batched=True`` all tasks go back through the encoder in one vectorized pass. This is faster only if one task's pass is
too small to keep the device busy.
"""

import time

import torch
from tasks import Model, batches
from torch import Tensor, nn

import gradkern as gk


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor, batched: bool) -> gk.SurgeryInfo:
    """Take one step, with losses as callables, so that each head runs only when its loss is needed."""
    h = model.trunk(x)

    def loss(t: int) -> Tensor:
        return nn.functional.mse_loss(model.heads[t](h).squeeze(-1), y[t])

    opt.zero_grad()
    info = opt.backward([lambda t=t: loss(t) for t in range(3)], features=h, batched=batched)
    opt.step()
    return info


def train(n: int, batched: bool) -> tuple[Model, gk.SurgeryInfo]:
    """Train for n steps; return the model and the info of the last step."""
    torch.manual_seed(0)
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad(order=range(3)))
    for x, y in batches(n):
        info = train_step(model, opt, x, y, batched)
    return model, info


def main() -> None:
    """Train for fifty steps in both ways."""
    times = []
    for batched in (False, True):
        train(1, batched)  # setup at first use takes longer than all steps
        start = time.perf_counter()
        _, info = train(50, batched)
        times.append(1e3 * (time.perf_counter() - start) / 50)
    one_by_one, together = times
    print(f"losses {info.losses.tolist()} after 50 steps; a step took {one_by_one:.1f} ms, batched {together:.1f} ms")


if __name__ == "__main__":
    main()
