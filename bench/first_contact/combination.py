"""``python -m bench.first_contact.combination DEVICE``: one combination of three rows in each dtype, for ncu."""

import sys

import torch

import gradkern as gk
from bench.device import parse_device

NUMBERS = {"cuda": 10**8, "cpu": 10**4}

if __name__ == "__main__":
    device = parse_device(sys.argv[1])
    for dtype in (torch.float32, torch.bfloat16):
        J = torch.ones(3, NUMBERS[device.type], dtype=dtype, device=device)
        g = gk.combine(J, torch.tensor([1.0, 2.0, 4.0], dtype=dtype, device=device))
        assert bool((g == 7).all())  # exact in both
