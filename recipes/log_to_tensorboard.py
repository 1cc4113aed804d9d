"""Logging of gradient surgery: a line of JSON for each logged step, TensorBoard if it is installed, and three figures.

Run ``python recipes/log_to_tensorboard.py``, then ``tensorboard --logdir log-out``.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import gradkern as gk
from gradkern import plots

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # pip install tensorboard
    SummaryWriter = None

TASKS = ("sum", "product", "difference")
STEPS, LOG_EVERY = 600, 3  # each logged step waits once for the device


class Net(nn.Module):
    """A trunk that is too narrow for all three tasks, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in TASKS)

    def losses(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each task's squared error, from one pass through the trunk. The tasks are functions of two numbers."""
        a, b = x.unbind(1)
        features = self.trunk(x)
        targets = (a + b, a * b, a - b)
        return [(head(features).squeeze(1) - y).square().mean() for head, y in zip(self.heads, targets, strict=True)]


def main(folder: str = "log-out") -> None:
    """Train, and write the log and the figures into ``folder``."""
    torch.manual_seed(0)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    model = Net()
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-2), gk.PCGrad())

    run = []
    board = SummaryWriter(out) if SummaryWriter else None
    with (out / "log.jsonl").open("w") as log:
        for step in range(STEPS):
            opt.zero_grad()
            info = opt.backward(model.losses(torch.randn(64, 2)))
            opt.step()
            if step % LOG_EVERY == 0:
                scalars = info.scalars(TASKS)  # {"loss/sum": …, "cosine/sum-product": …, "conflict": …, …}
                run.append({"step": step, **scalars})
                log.write(json.dumps(run[-1]) + "\n")
                if board:
                    for tag, value in scalars.items():
                        board.add_scalar(tag, value, step)
    if board:
        board.close()

    figures = {"cosines": plots.cosine_matrix, "conflict": plots.conflict_share, "weights": plots.weights}
    for name, draw in figures.items():  # they also read the file: plots.weights("log-out/log.jsonl")
        draw(run).savefig(out / f"{name}.png", dpi=150)

    tenth = len(run) // 10
    for task in TASKS:
        first, last = (sum(row[f"loss/{task}"] for row in part) / tenth for part in (run[:tenth], run[-tenth:]))
        print(f"loss of {task}: {first:.3f} in the first tenth of the run, {last:.3f} in the last")
    share = sum(row["conflict"] for row in run) / len(run)
    print(f"{share:.0%} of all pairs of task gradients were in conflict; log and figures are in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
