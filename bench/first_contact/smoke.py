"""``python -m bench.first_contact.smoke DEVICE OUT``: every operator and method against float64.

The checks are those of ``gradkern info``. They share processes, one dtype at a time, because a new card has compiled
nothing yet, and hundreds of kernels are to be compiled. A dry run takes every third check. The exit status is 1 if any
result is wrong.
"""

import sys
from itertools import product

import torch

from bench.device import parse_device
from bench.first_contact.workers import each
from gradkern.check import selfcheck
from gradkern.ops import backend
from gradkern.ops.dtypes import DTYPES
from gradkern.ops.triton.backend import BACKEND


def main() -> int:
    """Check everything, print a line for each check, and return the exit status."""
    device = parse_device(sys.argv[1])
    name, reason = backend(device.type)
    print(f"{selfcheck.describe(device)}: {name}: {reason}", flush=True)
    if device.type != "cpu" and name != BACKEND.name:
        print(f"FAILED: the kernels do not serve {device}: {reason}")
        return 1
    names = list(selfcheck.checks(device.type))[:: 1 if device.type == "cuda" else 3]
    wrong = dict.fromkeys(names, selfcheck.NOTHING)  # some compare in one dtype only, but each in one at least
    problems: dict[str, str] = {}
    for (check, dtype, _), outcome in each(_check, list(product(names, DTYPES, [device]))):
        if outcome.problem == selfcheck.NOTHING:
            continue
        print(f"{check}, {dtype}: {outcome.verdict}, {max(outcome.errors.values(), default=0.0):.1e}", flush=True)
        wrong.pop(check, None)
        if outcome.problem is not None:
            problems[check] = f"{dtype}: {outcome.problem}"
    wrong |= problems
    for check, problem in wrong.items():
        print(f"{check} FAILED: {problem}")
    print(f"{len(wrong)} of {len(names)} checks FAILED: {', '.join(wrong)}" if wrong else f"all {len(names)} checks OK")
    return 1 if wrong else 0


def _check(name: str, dtype: torch.dtype, device: torch.device) -> selfcheck.Outcome:
    return selfcheck.check(name, device, [dtype])


if __name__ == "__main__":
    sys.exit(main())
