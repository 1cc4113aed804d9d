"""The three tasks and their examples."""

from dataclasses import dataclass

TASKS = ("sst", "para", "sts")
"""Sentiment in five classes, paraphrase or not, similarity from 0 to 5. This order is used everywhere."""
CLASSES = {"sst": 5, "para": 2}
"""Number of classes of the tasks that classify; the third task predicts a number."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence or a pair, with its label: a class, or a similarity from 0 to 5."""

    id: str
    sentences: tuple[str, ...]
    label: float


Examples = dict[str, list[Example]]
"""Examples of each task."""
