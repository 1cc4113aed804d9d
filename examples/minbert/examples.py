"""The three tasks, and what an example of one is."""

from dataclasses import dataclass

TASKS = ("sst", "para", "sts")
"""Sentiment in five classes, paraphrase or not, similarity from 0 to 5; in this order everywhere."""
CLASSES = {"sst": 5, "para": 2}
"""Of the tasks that classify; the third predicts a number."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence, or a pair of them, and what people said of it: a class, or a similarity from 0 to 5."""

    id: str
    sentences: tuple[str, ...]
    label: float


Examples = dict[str, list[Example]]
"""Of each task."""
