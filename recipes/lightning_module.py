"""PyTorch Lightning: gradient surgery by manual optimization.

``configure_optimizers`` returns a ``SurgeryOptimizer`` as it would any other, and ``training_step`` calls
``opt.backward(losses)`` where it would call ``self.manual_backward(loss)``. The Trainer's precision, step count and
checkpoints, which hold what the surgery remembers, are as ever. One device: several raise.
"""

import logging

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
        """One loss per task, of inputs (n, 6) and targets (n, 3)."""
        h = self.trunk(x)
        return [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(self.heads, y.T, strict=True)]

    def configure_optimizers(self) -> tuple[list[gk.SurgeryOptimizer], list[ExponentialLR]]:
        """The surgery around AdamW, and a scheduler for it."""
        opt = gk.SurgeryOptimizer(torch.optim.AdamW(self.named_parameters(), lr=0.01), gk.PCGrad())
        return [opt], [ExponentialLR(opt, 0.9)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """One step of all tasks."""
        opt = self.optimizers()
        opt.zero_grad()
        # All that manual_backward does before its backward pass: scale a loss if precision is "16-mixed", call hooks.
        losses = [self.trainer.precision_plugin.pre_backward(loss, self) for loss in self.losses(*batch)]
        info = opt.backward(losses)
        opt.step()
        self.log("conflicting pairs", info.conflicts.float().sum() / 2)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are clipped here, where they are no longer scaled."""
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    def on_train_epoch_end(self) -> None:
        """Manual optimization steps its scheduler itself."""
        self.lr_schedulers().step()


def data() -> TensorDataset:
    """64 inputs and three targets, the third of which is the opposite of the first."""
    x = torch.randn(64, 6)
    a, b = x.sin().sum(1), x.square().sum(1)
    return TensorDataset(x, torch.stack([a, b, -a], 1))


def main() -> None:
    """Train for five epochs, and tell what has become of the losses."""
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
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, DataLoader(dataset, batch_size=16, shuffle=True))
    told = ", ".join(f"{b:.2f} -> {a:.2f}" for b, a in zip(before, model.losses(*dataset.tensors), strict=True))
    conflicts = trainer.callback_metrics["conflicting pairs"]
    print(f"{trainer.global_step} steps, losses {told}; {conflicts:.0f} of 3 pairs of tasks conflict")


if __name__ == "__main__":
    main()
