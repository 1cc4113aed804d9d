"""``python -m bench.first_contact.small DEVICE``: the one launch and AdamW on small inputs, beside the reference.

It is what compute-sanitizer runs. A dry run has the kernels interpreted.
"""

import sys

import torch

from bench.device import parse_device
from bench.first_contact.dry import kernels_serve
from gradkern.check import selfcheck

OPERATORS = ("surgery", "adamw")
DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,)}


def main() -> int:
    """Check both operators and return the exit status."""
    device = parse_device(sys.argv[1])
    with kernels_serve(device):
        outcomes = {name: selfcheck.check(name, device, DTYPES[device.type]) for name in OPERATORS}
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome.verdict}")
    return 1 if any(outcome.problem is not None for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
