"""Partners: the tasks onto whose gradients PCGrad projects a task's own; see the operator ``pcgrad``."""

from torch import Tensor

from gradkern.arguments import choice

PARTNERS = ("all", "random", "average", "most_similar", "most_different")
ORDERED = ("all", "random")
"""The kinds of partner that depend on an order. The Gramian determines the others."""


def check_partner(order_keys: Tensor | None, partner: str) -> None:
    """Raise unless ``partner`` is known, and ``order_keys`` are given exactly if it depends on an order."""
    if partner not in PARTNERS:
        choice("partner", partner, PARTNERS)  # raises
    if (order_keys is not None) != (partner in ORDERED):
        wanted = "given" if partner in ORDERED else "None"
        raise ValueError(
            f"order_keys must be {wanted} with partner={partner!r}, got {'None' if order_keys is None else 'some'}"
        )
