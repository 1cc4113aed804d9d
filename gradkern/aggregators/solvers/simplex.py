"""The nearest point of a simplex."""

from gradkern.aggregators.solvers.arrays import Array, ascending, largest, positions, space


def on_simplex(v: Array, among: Array | None) -> Array:
    """Return the nearest points (..., T) of the simplex of some entries, with 0 elsewhere.

    Args:
        v: (..., T).
        among: (..., T) bool, the entries, at least one; None for all.
    """
    xp = space(v)
    ordered = -ascending(-v if among is None else xp.where(among, -v, xp.inf))
    shift = (ordered.cumsum(-1) - 1) / (positions(v) + 1)
    # The entries above their own shift are the first ones; the last of these shifts is the greatest.
    shift = largest(xp.where(ordered > shift, shift, -xp.inf))
    nearest = (v - shift).clip(0)
    return nearest if among is None else xp.where(among, nearest, 0.0)
