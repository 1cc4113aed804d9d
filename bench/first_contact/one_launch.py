"""``python -m bench.first_contact.one_launch DEVICE OUT``: one launch against three, whatever the table of sizes says.

A dry run has the kernels interpreted, where the interpreter works.
"""

import sys
from itertools import product
from pathlib import Path

import torch

from bench.cases import Case
from bench.device import parse_device
from bench.first_contact.dry import kernels_serve
from bench.first_contact.measured import measured
from bench.first_contact.summary import LAUNCHES
from bench.floors import ITEM

SIZES = {"cuda": (10**5, 10**6, 10**7, 10**8), "cpu": (1000,)}
SECONDS = {"cuda": 0.15, "cpu": 0.002}


def cases(sizes: tuple[int, ...]) -> list[Case]:
    """Return the cases: for the whole model and for each parameter, three tasks first."""
    return [
        Case("surgery", T, P, dtype, shapes="pieces", groups=groups)
        for T, dtype, groups, P in product((3, 2, 4), ITEM, ("model", "parameter"), sizes)
    ]


def main() -> int:
    """Measure, and return the exit status."""
    device = parse_device(sys.argv[1])
    torch.manual_seed(0)
    with kernels_serve(device):
        some = cases(SIZES[device.type])[: None if device.type == "cuda" else 1]
        n_failed = measured(some, device, SECONDS[device.type], Path(sys.argv[2]) / "sweep.json", LAUNCHES)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
