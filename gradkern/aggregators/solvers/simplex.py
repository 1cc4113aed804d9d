"""The nearest point of a simplex."""

from math import inf

from gradkern.aggregators.solvers.arrays import Array, ascending, largest, positions, positive, space


def on_simplex(v: Array, among: Array | None) -> Array:
    """Return the nearest points (..., T) of the simplex of some entries, with 0 elsewhere.

    Args:
        v: (..., T).
        among: (..., T) bool, the entries, at least one; None for all.
    """
    ordered = -ascending(-v if among is None else space(v).where(among, -v, inf))
    # The shifts of the k largest entries grow with k up to the one that is sought, and fall from there on.
    nearest = positive(v - largest((ordered.cumsum(-1) - 1) / (positions(v) + 1)))
    return nearest if among is None else space(v).where(among, nearest, 0.0)
