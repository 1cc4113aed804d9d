"""The limits of the solvers of T x T problems: rounds and thresholds, for every back end.

``gradkern/aggregators/solvers`` has the algorithms. On tensors PyTorch takes a fixed number of rounds, because the host
cannot see when a problem is solved. Where it can, and in a kernel, a loop ends as soon as it may, and may take
``PATIENCE`` times as many rounds.
"""

from typing import NamedTuple

PATIENCE = 10


class ActiveSetLimits(NamedTuple):
    """Limits of active sets.

    Attributes:
        plain_rounds: the rounds without a guard. They solve more than 99 of 100 problems of random rows.
        first_ridge: relative to a diagonal of 1.
        next_ridge: the ratio of a ridge to the one before.
        last_ridge: the smallest one.
        noise: the size of a number that counts as 0, relative to the sum of all: some 900 roundings of float64.
    """

    plain_rounds: int = 8
    first_ridge: float = 1e-2
    next_ridge: float = 1e-2
    last_ridge: float = 2e-14
    noise: float = 1e-13

    @staticmethod
    def rounds(T: int) -> int:
        """Return the rounds with ridges for T tasks."""
        return 2 * T + 16


class FairLimits(NamedTuple):
    """Limits of Newton's method for fair weights.

    Attributes:
        rounds: all rounds.
        close: the relative change after which another round would change nothing: its square is below rounding.
        near: the relative change below which each is the square of the one before, up to rounding.
        fall: the part of a number that one round may take from it.
        growth: the multiple of a number that one round may add to it. Without a bound, rounds may circle.
        apart: the square of the distance of 0 from the hull, relative to the rows', below which there is no solution.
    """

    rounds: int = 48
    close: float = 1e-8
    near: float = 1e-3
    fall: float = 0.99
    growth: float = 30.0
    apart: float = 1e-14


ACTIVE_SET = ActiveSetLimits()
FAIR = FairLimits()


def sweeps(T: int) -> int:
    """Return the sweeps of Jacobi's method for T x T matrices."""
    return 6 + T.bit_length()
