"""PyTorch Lightning: gradient surgery by manual optimization.

``configure_optimizers`` returns a ``SurgeryOptimizer`` like any other optimizer, and ``training_step`` calls
``opt.backward(losses)`` instead of ``self.manual_backward(loss)``. The Trainer's precision, step count and checkpoints
work as usual; checkpoints include the state of the surgery. With several devices and ``strategy="ddp"`` each process
has a part of every batch.
"""

import logging
import os

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import gradkern as gk


class MultiTask(L.LightningModule):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(3))

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return one loss per task, from inputs (n, 6) and targets (n, 3)."""
        h = self.trunk(x)
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y.T, strict=True)]

    def configure_optimizers(self) -> tuple[list[gk.SurgeryOptimizer], list[ExponentialLR]]:
        """Return AdamW wrapped in the surgery, and its scheduler."""
        opt = gk.SurgeryOptimizer(torch.optim.AdamW(self.named_parameters(), lr=0.01), gk.PCGrad())
        return [opt], [ExponentialLR(opt, 0.9)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take one step on all tasks."""
        opt = self.optimizers()
        opt.zero_grad()
        # manual_backward does this before its backward pass: it calls hooks, and scales losses under "16-mixed".
        losses = [self.trainer.precision_plugin.pre_backward(loss, self) for loss in self.losses(*batch)]
        info = opt.backward(losses)
        opt.step()
        self.log("conflicting pairs", info.conflicts.float().sum() / 2)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, which are no longer scaled here."""
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    def on_train_epoch_end(self) -> None:
        """Step the scheduler, which manual optimization must do itself."""
        self.lr_schedulers().step()


def data() -> TensorDataset:
    """Return 64 inputs and three targets; the third target is the negative of the first."""
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    return TensorDataset(x, torch.stack([a, b, -a], 1))


def main() -> None:
    """Train for five epochs, and print the losses before and after."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model, dataset = MultiTask(), data()
    before = model.losses(*dataset.tensors)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun sets it
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", devices=devices, **quiet)
    trainer.fit(model, DataLoader(dataset, batch_size=16, shuffle=True))
    losses = ", ".join(f"{b:.2f} -> {a:.2f}" for b, a in zip(before, model.losses(*dataset.tensors), strict=True))
    conflicts = trainer.callback_metrics["conflicting pairs"]
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps, losses {losses}; {conflicts:.0f} of 3 pairs of tasks conflict")


if __name__ == "__main__":
    main()
