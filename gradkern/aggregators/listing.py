"""The list of methods with their needs and costs, as text and as data; ``gradkern methods`` prints it.

Nothing here is written down for a single method. The class says what it looks at (``Aggregator.needs_gramian`` and its
like), and the cost follows from that. A word is one number of a gradient, and costs are words moved for each parameter
beyond the backward passes:

- A weighting of losses is one backward pass of their weighted sum. It moves nothing more. If it looks at the Gramian, T
  passes come before, and the rows are read once: T.
- A method that looks at the Gramian reads the T rows for it, and once more for the combination, whose result it writes:
  2T + 1. So does one that also looks at entries, since they are a few thousand of all.
- A method without a Gramian reads the T rows once and writes the result: T + 1.
- A history of the rows is read and written: 2T more.
- A second batch has T passes of its own. Its rows and the first one's are read for their dot products: 2T more.
"""

from typing import Any, NamedTuple

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from gradkern.aggregators.weightings.scalarization import Scalarization

LEGEND = """\
passes: backward passes of a step. words: numbers that surgery moves for each parameter beyond the passes, with T tasks:
2T + 1 reads the rows for the Gramian, reads them again for the combination, and writes the result; T + 1 needs no
Gramian; a history of the rows, or a second batch, adds 2T. state: what a step leaves for later ones; it is in
state_dict."""


class Listed(NamedTuple):
    """A method in the list.

    Attributes:
        name: the name on the command line, and for :func:`gradkern.aggregator`.
        call: the class with its arguments.
        needs: what it looks at: "Gramian", "losses", "second batch", "history" and "entries".
        passes: the backward passes of a step, "T" or "1", or "T + 1" for both; "2T" with a second batch.
        words: the numbers moved for each parameter beyond them; see the module.
        state: "" for none, "small", or "T for each parameter".
        paper: authors and year, or the title of a report without a known author.
        title: the title.
    """

    name: str
    call: str
    needs: tuple[str, ...]
    passes: str
    words: str
    state: str
    paper: str
    title: str


def listed(method: Method) -> Listed:
    """Return a row of METHODS as a line of the list."""
    made = method.make()
    author, year, title = method.paper
    needs = {
        "Gramian": made.needs_gramian,
        "losses": made.needs_losses,
        "second batch": made.needs_second,
        "history": made.averages_rows,
        "entries": made.needs_entries,
    }
    weighting = isinstance(made, Scalarization)
    state = "T for each parameter" if made.averages_rows else "small" if method.state else ""
    return Listed(
        method.name,
        called(method),
        tuple(need for need, needed in needs.items() if needed),
        ("T + 1" if made.needs_gramian else "1") if weighting else "2T" if made.needs_second else "T",
        ("T" if made.needs_gramian else "0") if weighting else _words(made),
        state,
        f"{author} {year}" if author else title,
        title,
    )


def called(method: Method) -> str:
    """Return the class with its arguments, as Python writes the call."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in method.arguments.items())
    return f"{method.aggregator.__name__}({arguments})"


def data() -> list[dict[str, Any]]:
    """Return all methods as dictionaries that JSON can hold."""
    return [listed(method)._asdict() for method in METHODS.values()]


def text() -> str:
    """Return all methods as an aligned table, with the meaning of its columns."""
    rows = [["name", "class", "needs", "passes", "words", "state", "paper"]]
    for one in map(listed, METHODS.values()):
        rows.append(
            [one.name, one.call, ", ".join(one.needs) or "-", one.passes, one.words, one.state or "-", one.paper]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", LEGEND])


def _words(made: Aggregator) -> str:
    tasks = 1 + made.needs_gramian + 2 * made.averages_rows + 2 * made.needs_second
    return f"{tasks}T + 1" if tasks > 1 else "T + 1"
