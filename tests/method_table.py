"""The table in ``docs/methods.md``, made from the rows of METHODS. ``python -m tests.method_table`` writes it."""

from pathlib import Path

from gradkern.aggregators.listing import called
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
START = "<!-- python -m tests.method_table -->\n"


def table() -> str:
    """Return the table, with one line for each method."""
    head = (
        "| Name | Class | Source | Update of task gradients without conflict "
        "| Unchanged if one task's gradient gets longer | Draws at random | State |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(f"| {' | '.join(_cells(method))} |\n" for method in METHODS.values())


def _cells(method: Method) -> list[str]:
    laws, name = method.laws, method.aggregator.__name__
    author, year, title = method.paper
    return [
        f"`{method.name}`",
        f"[`{called(method)}`](methods/{name.lower()}.md)",
        f"{author} {year}, “{title}”" if author else f"“{title}”",
        f"their {laws.no_conflict}" if laws.no_conflict else "",
        f"the {laws.invariant}" if laws.invariant else "",
        method.draws or "",
        "yes" if method.state else "",
    ]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(START)[0] + START + table())
