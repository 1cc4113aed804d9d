"""Whom PCGrad projects a task's gradient onto: see ``schema.py``."""

from torch import Tensor

PARTNERS = ("all", "random", "average", "most_similar", "most_different")
ORDERED = ("all", "random")
"""Of the partners those that depend on an order; which the others are follows from the Gramian."""


def check_partner(keys: Tensor | None, partner: str) -> None:
    """Raise unless ``partner`` is one of those that there are, with keys if it depends on an order, else without."""
    if partner not in PARTNERS:
        raise ValueError(f"partner must be one of {', '.join(map(repr, PARTNERS))}; got {partner!r}")
    if (keys is not None) != (partner in ORDERED):
        wanted = "given" if partner in ORDERED else "None"
        raise ValueError(f"keys must be {wanted} with partner={partner!r}, got {'None' if keys is None else 'some'}")
