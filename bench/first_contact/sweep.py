"""``python -m bench.first_contact.sweep DEVICE OUT``: each pass over the gradients at each T, beside a copy."""

import sys
from pathlib import Path

import torch

from bench.cases import Case
from bench.device import free_bytes, parse_device
from bench.first_contact.measured import measured
from bench.floors import ITEM

TASKS = (3, 8, 2, 4, 16, 40, 32)
"""Numbers of tasks, the most frequent first."""
ON_MATRIX, IN_PLACE = ("gramian", "combine", "project"), ("surgery", "adamw")
BYTES = {"cuda": 3 << 30, "cpu": 1 << 18}
"""Bytes of all gradients together: on a GPU far more than its caches hold, unless it has little memory."""
ALIGNED = 1024
"""What the length of a row is a multiple of. Rows of a matrix then start where 128-bit loads are possible."""
SHARE = 1 / 16
"""The share of the free memory that the gradients may take. A case takes some five times as much."""
SECONDS = {"cuda": 0.3, "cpu": 0.002}
"""Seconds of a case, of which there are seventy."""


def cases(n_bytes: int) -> list[Case]:
    """Return the cases. Those on the same gradients are adjacent."""
    found = []
    for T in TASKS:
        for dtype, item in ITEM.items():
            P = n_bytes // (item * T) // ALIGNED * ALIGNED
            found += [Case(operation, T, P, dtype) for operation in ON_MATRIX]
            found += [Case(operation, T, P, dtype, shapes="pieces") for operation in IN_PLACE]
    return found


if __name__ == "__main__":
    device = parse_device(sys.argv[1])
    torch.manual_seed(0)
    n_bytes = min(BYTES[device.type], int(SHARE * free_bytes(device)))
    n_failed = measured(cases(n_bytes), device, SECONDS[device.type], Path(sys.argv[2]) / "sweep.json")
    sys.exit(1 if n_failed else 0)
