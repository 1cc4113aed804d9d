"""Checkpoints: a run that was interrupted in the middle of an epoch goes on to the same bits.

Everything with a ``state_dict`` is saved. That of a SurgeryOptimizer holds the optimizer's and the surgery's: GradVac's
targets, the tasks' remembered gradients and the state of the generator that draws its orders. What is left is torch's
own generator, from which dropout draws; on a GPU it is ``torch.cuda.get_rng_state``.
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
    """All that has a state."""
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
    """The loss of one task on its batch."""
    return run["scaler"].scale(nn.functional.mse_loss(run["model"](x)[task], y))


def train(run: dict[str, Any], stop: int | None = None) -> None:
    """To the end, or until ``stop`` steps of an epoch have been taken."""
    for _ in range(run["sampler"].epoch, EPOCHS):
        for drawn in run["sampler"]:
            run["opt"].update(
                [None if batch is None else scaled_loss(run, task, *batch) for task, batch in enumerate(drawn)],
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
    """Take up a checkpoint in a run built anew."""
    state = torch.load(path)
    for name, part in run.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])


def main() -> None:
    """One run without a break, and one with."""
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
