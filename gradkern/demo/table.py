"""The comparison as a table in the terminal: a column for each method, mean ± standard deviation over seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

from rich.table import Table

from gradkern.demo.methods import BASELINE
from gradkern.demo.results import TASK_NAMES, Result, Row, by_method, rows

# Column of the CSV file, what to call it here, unit to convert to, digits.
LINES = [
    *((f"accuracy {name}", f"accuracy: {name} (%)", 100, 1) for name in TASK_NAMES),
    ("conflicting pairs", "conflicting pairs (%)", 100, 1),
    ("mean cosine", "mean cosine", 1, 3),
    ("surgery ms", "surgery per step (ms)", 1, 2),
    ("step ms", "step (ms)", 1, 2),
    (f"step relative to {BASELINE}", f"step relative to {BASELINE}", 1, 2),
]


def table(results: Sequence[Result]) -> Table:
    """A line for each quantity. "-" stands where a method has none."""
    methods = by_method(results)
    spread = "± standard deviation over seeds; " if len(results) > len(methods) else ""
    table = Table(title="Overlaid digits, three tasks", caption=f"{spread}times are medians over steps")
    table.add_column("")
    for method in methods:
        table.add_column(method, justify="right")
    of_method = [[row for row in rows(results) if row["method"] == method] for method in methods]
    for column, name, unit, digits in LINES:
        table.add_row(name, *(_cell(rows, column, unit, digits) for rows in of_method))
    return table


def _cell(rows: Sequence[Row], column: str, unit: float, digits: int) -> str:
    values = [unit * value for row in rows if isinstance(value := row[column], (int, float))]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
