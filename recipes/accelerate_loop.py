"""Hugging Face Accelerate: a training loop with gradient surgery.

``accelerator.prepare`` takes a ``SurgeryOptimizer`` as it would any other, and wraps it: the surgery is then one
``.optimizer`` further in. Its ``backward`` stands where ``accelerator.backward`` stood, and its ``accumulate``, which
does one surgery for several batches, where ``accelerator.accumulate`` did. Mixed precision, clipping, the scheduler,
``save_state`` and ``load_state``, which hold what the surgery remembers, are as ever. One process: several raise.
"""

from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import gradkern as gk


class MultiTask(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """One loss per task, of inputs (n, 6) and targets (n, 3)."""
        h = self.trunk(x)
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y.T, strict=True)]


def backward(
    accelerator: Accelerator, model: nn.Module, opt: torch.optim.Optimizer, batches: list[list[Tensor]]
) -> None:
    """Fill ``.grad`` from the ``batches`` of one step; ``opt`` is Accelerate's."""
    with opt.optimizer.accumulate():
        for batch in batches:
            losses = [loss / len(batches) for loss in model(*batch)]
            if accelerator.scaler is not None:  # mixed_precision="fp16"
                losses = accelerator.scaler.scale(losses)
            opt.optimizer.backward(losses)


def train(accelerator: Accelerator, dataset: TensorDataset, epochs: int, resume: str | None = None) -> nn.Module:
    """The model after some epochs from where ``accelerator.save_state(resume)`` has been called, or from scratch."""
    model = MultiTask()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=0.01), gk.PCGrad())
    loader = DataLoader(dataset, batch_size=16)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, ExponentialLR(opt, 0.99))
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(epochs):
        batches = iter(loader)
        while of_step := list(islice(batches, 2)):
            opt.zero_grad()
            backward(accelerator, model, opt, of_step)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
    return model


def data() -> TensorDataset:
    """64 inputs and three targets, the third of which is the opposite of the first."""
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    return TensorDataset(x, torch.stack([a, b, -a], 1))


def main() -> None:
    """Train in bfloat16, two batches a step, and tell what the losses have come to."""
    torch.manual_seed(0)
    dataset = data()
    model = train(Accelerator(mixed_precision="bf16", cpu=True), dataset, epochs=40)
    print("losses after 80 steps " + ", ".join(f"{loss:.2f}" for loss in model(*dataset.tensors)))


if __name__ == "__main__":
    main()
