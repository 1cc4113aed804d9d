"""A table of the comparison for the terminal: a row for each method, mean ± standard deviation over seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

from rich.box import SIMPLE
from rich.table import Table

from gradkern.demo.methods import BASELINE, METHODS
from gradkern.demo.results import TASK_NAMES, Result, Row, ranked, rows

# Each entry: column of the CSV file, heading here, factor of the unit, digits. No word of a heading is longer than six
# letters, so that the table fits into 80 columns without a broken word.
COLUMNS = [
    *((f"accuracy {name}", f"{name} (%)", 100, 1) for name in TASK_NAMES),
    ("mean accuracy", "mean (%)", 100, 1),
    ("conflicting pairs", "confl. (%)", 100, 1),
    ("mean cosine", "cosine", 1, 2),
    ("surgery ms", "surg. (ms)", 1, 1),
    (f"step relative to {BASELINE}", f"step / {BASELINE}", 1, 2),
]


def table(results: Sequence[Result]) -> Table:
    """Return the table: a row for each method, the best first. A "-" marks a quantity that a method does not have."""
    methods = ranked(results)
    notes = ["highest mean accuracy first"]
    notes += ["± standard deviation over seeds"] if len(results) > len(methods) else []
    notes += [
        "confl.: pairs of tasks in conflict",
        "surg.: the surgery of a step",
        "a step is one batch, times are medians",
    ]
    in_turn = [method for method in methods if METHODS[method].memory]
    if in_turn:
        notes.append(f"{', '.join(in_turn)}: an update for each task in turn, so {len(TASK_NAMES)} a step")
    title = "Overlaid digits: accuracy of three tasks, conflict, time"
    table = Table(
        title=title, caption="; ".join(notes), box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1)
    )
    table.add_column("method", no_wrap=True)
    for _, heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", overflow="fold")
    for method in methods:
        of_method = [row for row in rows(results) if row["method"] == method]
        table.add_row(method, *(_cell(of_method, column, unit, digits) for column, _, unit, digits in COLUMNS))
    return table


def _cell(rows: Sequence[Row], column: str, unit: float, digits: int) -> str:
    values = [unit * value for row in rows if isinstance(value := row[column], (int, float))]
    if not values:
        return "-"
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""  # a narrow terminal breaks the cell here
    return f"{mean(values):.{digits}f}{spread}"
