"""Hugging Face Accelerate: a training loop with gradient surgery.

``accelerator.prepare`` takes a ``SurgeryOptimizer`` like any other optimizer and wraps it, so that ``opt.optimizer`` is
the ``SurgeryOptimizer``. Its ``backward`` replaces ``accelerator.backward``, and its ``accumulate``, which does one
surgery for several batches, replaces ``accelerator.accumulate``. Mixed precision, clipping and the scheduler work as
usual. So do ``save_state`` and ``load_state``, which include the state of the surgery. ``torchrun`` and
``accelerate launch`` start several processes, and ``split_batches`` gives each its part of every batch.
"""

from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
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
        """Return one loss per task, from inputs (n, 6) and targets (n, 3)."""
        h = self.trunk(x)
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y.T, strict=True)]


def backward(
    accelerator: Accelerator, model: nn.Module, opt: torch.optim.Optimizer, batches: list[list[Tensor]]
) -> None:
    """Fill ``.grad`` from the ``batches`` of one step; ``opt`` is Accelerate's wrapper."""
    with opt.optimizer.accumulate():
        for batch in batches:
            losses = [loss / len(batches) for loss in model(*batch)]
            if accelerator.scaler is not None:  # mixed_precision="fp16"
                losses = accelerator.scaler.scale(losses)
            opt.optimizer.backward(losses)


def train(accelerator: Accelerator, dataset: TensorDataset, epochs: int, resume: str | None = None) -> nn.Module:
    """Train for some epochs, from the state saved in ``resume`` or from scratch; return the model."""
    model = MultiTask()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=0.01), gk.PCGrad())
    loader = DataLoader(dataset, batch_size=16)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, ExponentialLR(opt, 0.99))
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(epochs):
        batches = iter(loader)
        while step_batches := list(islice(batches, 2)):
            opt.zero_grad()
            backward(accelerator, model, opt, step_batches)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
    return model


def data() -> TensorDataset:
    """Return 64 inputs and three targets; the third target is the negative of the first."""
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    return TensorDataset(x, torch.stack([a, b, -a], 1))


def main() -> None:
    """Train in bfloat16 with two batches per step, and print the final losses."""
    torch.manual_seed(0)
    dataset = data()
    parts = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, dataloader_config=parts)
    model = train(accelerator, dataset, epochs=40)
    accelerator.print("losses after 80 steps " + ", ".join(f"{loss:.2f}" for loss in model(*dataset.tensors)))


if __name__ == "__main__":
    main()
