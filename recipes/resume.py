"""Checkpoints: a run that is interrupted in the middle of an epoch resumes to the same bits.

The checkpoint holds every ``state_dict``. The one of a SurgeryOptimizer includes the inner optimizer's state and the
surgery's: GradVac's targets, the tasks' remembered gradients and the state of the generator that draws the orders. Save
torch's default generator too, because dropout draws from it; on a GPU use ``torch.cuda.get_rng_state``.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from tasks import Model, batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradkern as gk
from gradkern.sampling import TaskSampler

EPOCHS = 2


def build(seed: int) -> dict[str, Any]:
    """Return all parts of a run that have a state."""
    torch.manual_seed(seed)
    model = Model()
    model.trunk.append(nn.Dropout(0.1))
    method = gk.GradVac(generator=torch.Generator().manual_seed(seed))
    inner = gk.optim.AdamW(model.named_parameters(), lr=1e-2)
    opt = gk.SurgeryOptimizer(inner, method, shared=model.trunk, memory=True)
    ((x, y),) = batches(1)
    loaders = [DataLoader(TensorDataset(x, target), batch_size=8, shuffle=True) for target in y]
    return {
        "model": model,
        "opt": opt,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, 24),
        "sampler": TaskSampler(loaders, "random"),
        "scaler": torch.amp.GradScaler("cpu", growth_interval=5),
    }


def scaled_loss(run: dict[str, Any], task: int, x: Tensor, y: Tensor) -> Tensor:
    """Return the scaled loss of one task on its batch."""
    return run["scaler"].scale(nn.functional.mse_loss(run["model"](x)[task], y))


def train(run: dict[str, Any], stop: int | None = None) -> None:
    """Train to the end, or until ``stop`` steps of an epoch have been taken."""
    for _ in range(run["sampler"].epoch, EPOCHS):
        for task_batches in run["sampler"]:
            run["opt"].update(
                [None if batch is None else scaled_loss(run, task, *batch) for task, batch in enumerate(task_batches)],
                max_norm=1.0,
                scaler=run["scaler"],
            )
            run["scaler"].update()
            run["scheduler"].step()
            if run["sampler"].step == stop:
                return


def save(run: dict[str, Any], path: Path) -> None:
    """Write a checkpoint."""
    torch.save({name: part.state_dict() for name, part in run.items()} | {"rng": torch.get_rng_state()}, path)


def load(run: dict[str, Any], path: Path) -> None:
    """Load a checkpoint into a newly built run."""
    state = torch.load(path)
    for name, part in run.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])


def main() -> None:
    """Train one run without interruption and one with, and compare their parameters."""
    whole, first, second = build(0), build(0), build(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.manual_seed(0)
        train(whole)
        torch.manual_seed(0)
        train(first, stop=5)
        save(first, path)
        load(second, path)
        train(second)
    same = all(map(torch.equal, whole["model"].parameters(), second["model"].parameters()))
    print(f"parameters after {EPOCHS} epochs, resumed in the first: {'the same bits' if same else 'not the same'}")


if __name__ == "__main__":
    main()
