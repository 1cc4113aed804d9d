"""One run: the weights of every method for each number of tasks, then a whole aggregation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.measure import measure, quantiles, ratio
from bench.methods.contestants import OURS, Calls, of_aggregation, of_weights
from gradkern.aggregators.listing import listed
from gradkern.aggregators.method import Method

CPU = torch.device("cpu")


def run(
    methods: Sequence[Method],
    tasks: Sequence[int],
    shape: tuple[int, int],
    seconds: float,
    results: dict[str, Any],
    progress: Callable[[str], object],
) -> None:
    """Measure everything.

    Args:
        methods: rows of METHODS.
        tasks: the numbers of tasks for the weights.
        shape: the rows of a whole aggregation.
        seconds: approximate time for each line, all its contestants together; whole aggregations take five times that.
        results: results whose "rows", "whole" and "skipped" are extended.
        progress: called with a line that says what has been measured.
    """
    results |= {"shape": list(shape), "tasks": list(tasks), "whole": []}
    for method in methods:
        told = {"method": method.name, "words": listed(method).words}
        for T in tasks:
            _add(results, "rows", told | {"T": T}, lambda m=method, T=T: of_weights(m, T), seconds, progress)
        whole = told | {"T": shape[0], "P": shape[1]}
        _add(results, "whole", whole, lambda m=method: of_aggregation(m, *shape), 5 * seconds, progress)


def _add(
    results: dict[str, Any],
    key: str,
    told: dict[str, Any],
    make: Callable[[], Calls],
    seconds: float,
    progress: Callable[[str], object],
) -> None:
    """Measure one line and add it to the results, or the reason why it is left out."""
    torch.manual_seed(0)
    try:
        found = measure(make(), OURS, seconds, CPU)
    except Exception as error:  # a method that cannot be called so must not end a long run
        results["skipped"].append(told | {"what": key, "why": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    ours = found.seconds[OURS]
    results[key].append(
        told
        | {
            "rounds": len(ours),
            "seconds": {name: quantiles(of) for name, of in found.seconds.items()},
            "ratios": {name: ratio(of, ours) for name, of in found.seconds.items() if name != OURS},
            "absent": found.failed,
        }
    )
    progress(f"{key}: {told['method']}, T = {told['T']}: {1e6 * quantiles(ours)['p50']:.1f} µs")
