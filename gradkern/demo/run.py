"""The demo as a program: it trains with a progress bar, then writes the table, CSV files and plots."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gradkern.demo.plots import plot_cosines, plot_losses, plot_outcome
from gradkern.demo.results import epoch_rows, rows, write_csv
from gradkern.demo.table import table
from gradkern.demo.training import Settings, compare


def run(
    methods: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    device: torch.device,
    out: Path,
    settings: Settings | None = None,
) -> None:
    """Compare ``methods`` over ``seeds``, print the table and write it to ``out`` with the plots."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    # The bar is drawn between epochs only, because a thread that redraws it would disturb the steps that are timed.
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as progress:
        what = f"{len(methods)} method(s), {len(seeds)} seed(s) on {device}"
        bar = progress.add_task(what, total=len(methods) * len(seeds) * epochs)
        progress.refresh()
        results = compare(
            methods,
            seeds,
            epochs,
            device,
            settings or Settings(),
            on_epoch=lambda: progress.update(bar, advance=1, refresh=True),
        )
    console.print(table(results))
    write_csv(out / "results.csv", rows(results))
    write_csv(out / "epochs.csv", epoch_rows(results))
    plot_outcome(results, out / "methods.png")
    plot_losses(results, out / "loss.png")
    plot_cosines(results, out / "cosine.png")
    console.print(f"Written to {out}: results.csv, epochs.csv, methods.png, loss.png, cosine.png")
