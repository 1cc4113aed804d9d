"""What a run shows while it trains: a bar for each phase, and a line for each epoch."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.minbert.schemes import Phase


class Shown:
    """A bar with the loss and the share of conflicts of the last step, and the scores of the last epoch.

    It is drawn between steps only: a thread that redraws it would run beside the steps that are timed.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self.bars = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)
        self.bar = self.bars.add_task("", visible=False, told="")
        self.scores = ""

    def phase(self, name: str, steps: int, taken: int) -> None:
        """A phase of so many steps begins, or goes on after some of them."""
        self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=steps, completed=taken, told="")
        self.bars.refresh()

    def step(self, line: dict[str, Any]) -> None:
        """A step has been taken."""
        loss = f"loss {line['total_loss']:.3f}" if "total_loss" in line else "loss not finite"
        conflict = f", {line['conflict']:.0%} in conflict" if "conflict" in line else ""
        self.bars.update(self.bar, advance=1, told=loss + conflict + self.scores, refresh=True)

    def epoch(self, phase: Phase, entry: dict[str, Any]) -> None:
        """An epoch has been evaluated: the tasks it trained and, where these are all, the overall scores."""
        dev = entry["dev"]
        each = ", ".join(f"{task} {dev[task].get('accuracy', dev[task].get('pearson')):.3f}" for task in phase.tasks)
        overall = [f"{name} {entry[name]:.3f}" for name in ("average", "overall") if entry[name] is not None]
        self.scores = f", {overall[0] if overall else each}"
        told = "; ".join([each, *([", ".join(overall)] if overall else [])])
        self.bars.console.print(f"epoch {entry['epoch']}, {entry['phase']}: {told}", soft_wrap=True)
