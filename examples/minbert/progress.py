"""The progress display of a run: a bar for each phase, and a line for each epoch."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.minbert.schemes import Phase


class ProgressBar:
    """A bar with the loss and the share of conflicts of the last step, and the scores of the last epoch.

    It is redrawn only between steps. A thread that redraws it would disturb the timing of the steps.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.bars = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)
        self.bar = self.bars.add_task("", visible=False, text="")
        self.scores = ""

    def phase(self, name: str, steps: int, taken: int) -> None:
        """Start the bar of a phase with ``steps`` steps, of which ``taken`` are done."""
        self.bars.remove_task(self.bar)
        self.bar = self.bars.add_task(name, total=steps, completed=taken, text="")
        self.bars.refresh()

    def step(self, line: dict[str, Any]) -> None:
        """Advance the bar by a step and show its line."""
        loss = f"loss {line['total_loss']:.3f}" if "total_loss" in line else "loss not finite"
        conflict = f", {line['conflict']:.0%} in conflict" if "conflict" in line else ""
        self.bars.update(self.bar, advance=1, text=loss + conflict + self.scores, refresh=True)

    def epoch(self, phase: Phase, entry: dict[str, Any]) -> None:
        """Print an epoch's scores of the tasks it trained, and the overall scores if it trained all."""
        dev = entry["dev"]
        each = ", ".join(f"{task} {dev[task].get('accuracy', dev[task].get('pearson')):.3f}" for task in phase.tasks)
        overall = [f"{name} {entry[name]:.3f}" for name in ("average", "overall") if entry[name] is not None]
        self.scores = f", {overall[0] if overall else each}"
        text = "; ".join([each, *([", ".join(overall)] if overall else [])])
        self.bars.console.print(f"epoch {entry['epoch']}, {entry['phase']}: {text}", soft_wrap=True)
