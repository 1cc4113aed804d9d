"""A progress bar on the terminal: rich's if it is installed. Else, and in a log, lines on the standard error."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int) -> Iterator[Callable[[str], object]]:
    """Yield what is called with a line at the start of each of ``total`` parts."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It is drawn between measurements only, because a thread that redraws it would disturb them.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        shown = progress.add_task("", total=total)
        begun = 0

        def begin(text: str) -> None:
            nonlocal begun
            progress.update(shown, description=text, completed=begun, refresh=True)
            begun += 1

        yield begin
        progress.update(shown, description="done", completed=begun, refresh=True)


def _lines(total: int) -> Callable[[str], object]:
    begun = 0

    def begin(text: str) -> None:
        nonlocal begun
        begun += 1
        print(f"[{begun}/{total}] {text}", file=sys.stderr, flush=True)

    return begin
