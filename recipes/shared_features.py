"""One forward pass through an encoder for all tasks: the heads go back to its output, and the encoder once per task.

``features=`` names what the heads share. Each head's graph is freed before the next one's runs, and with
``batched=True`` the tasks go back through the encoder together, in one vectorized pass: faster where one task's pass is
too small to keep the device busy, and only then.
"""

import time

import torch
from tasks import Model, batches
from torch import Tensor, nn

import gradkern as gk


def train_step(model: Model, opt: gk.SurgeryOptimizer, x: Tensor, y: Tensor, batched: bool) -> gk.SurgeryInfo:
    """One step, with losses as callables: no head runs before its turn."""
    h = model.trunk(x)

    def loss(t: int) -> Tensor:
        return nn.functional.mse_loss(model.heads[t](h).squeeze(-1), y[t])

    opt.zero_grad()
    info = opt.backward([lambda t=t: loss(t) for t in range(3)], features=h, batched=batched)
    opt.step()
    return info


def train(n: int, batched: bool) -> tuple[Model, gk.SurgeryInfo]:
    """The model after n steps, and what the last one told."""
    torch.manual_seed(0)
    model = Model()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad(order=range(3)))
    for x, y in batches(n):
        info = train_step(model, opt, x, y, batched)
    return model, info


def main() -> None:
    """Fifty steps in either way."""
    taken = []
    for batched in (False, True):
        train(1, batched)  # what is loaded and set up at first use takes longer than all the rest
        start = time.perf_counter()
        _, info = train(50, batched)
        taken.append(1e3 * (time.perf_counter() - start) / 50)
    each, together = taken
    print(f"losses {info.losses.tolist()} after 50 steps; one took {each:.1f} ms, batched {together:.1f} ms")


if __name__ == "__main__":
    main()
