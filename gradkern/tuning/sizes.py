"""The lengths of rows for which one launch does the whole surgery faster than three: PCGrad of a model's gradients.

A length counts if the one launch is faster by more than the noise with one group and with a group for each tensor. The
range is the longest run of neighbouring measured lengths that count, from the first one to the last.
"""

import statistics
from contextlib import nullcontext

import torch

from gradkern.kernels.served import Key
from gradkern.kernels.settings import Sizes
from gradkern.ops import operators
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.tables import candidates
from gradkern.tuning import clock
from gradkern.tuning.contest import Contestant, is_faster, rounds_of
from gradkern.tuning.inputs import SHARE, Inputs

PARTNER = "all"


def in_one(x: Inputs) -> None:
    """Do the surgery in one launch."""
    operators.surgery(x.rows, ProjectionArguments(x.keys, PARTNER, None, None, 0.0, False), x.out, None, False, None)


def in_three(x: Inputs) -> None:
    """Do it in a launch for the Gramian, one for the method, and one for the combination."""
    C = operators.pcgrad(operators.gramian_tensors(x.rows, None), x.keys, PARTNER)
    operators.combine_tensors(x.rows, C.sum(-2), x.out, None, None)


def measured(key: Key, dtype: torch.dtype, seconds: float, device: torch.device) -> tuple[Sizes, dict[int, float]]:
    """Return the range in which one launch wins, and by length the greater of both ratios of its time to three's."""
    free = clock.free_bytes(device)
    lengths = [P for P in candidates.ONE_LAUNCH_SIZES if SHARE // 2 * key.rows * P * key.itemsize <= free]
    wins, ratios = [], {}
    for P in lengths:
        of_both = [_compared(key, dtype, P, groups, seconds / 2 / len(lengths), device) for groups in (False, True)]
        wins.append(all(won for won, _ in of_both))
        ratios[P] = max(ratio for _, ratio in of_both)
    return longest_run(lengths, wins), ratios


def _compared(
    key: Key, dtype: torch.dtype, P: int, groups: bool, seconds: float, device: torch.device
) -> tuple[bool, float]:
    """Return whether one launch is faster, and its time over that of three."""
    x = Inputs(key.rows, dtype, device, P, groups)
    three = Contestant(nullcontext(), lambda: in_three(x))
    one = Contestant(nullcontext(), lambda: in_one(x))
    first, times, again = rounds_of([three, one, three], seconds, device)
    return is_faster(times, first, again), statistics.median(times) / statistics.median(first)


def longest_run(lengths: list[int], wins: list[bool]) -> Sizes:
    """Return the longest run of neighbouring lengths that all win; the first of several."""
    best, start = (0, 0), 0
    for k, won in enumerate([*wins, False]):
        if not won:
            best = max(best, (start, k), key=lambda run: run[1] - run[0])
            start = k + 1
    first, end = best
    return Sizes(lengths[first], lengths[end - 1] + 1) if end > first else Sizes(0, 0)
