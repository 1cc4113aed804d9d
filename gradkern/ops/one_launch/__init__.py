"""The door to the surgery in one launch; this folder and ``kernels/surgery.py`` are all of it.

The kernel serves few rows on NVIDIA's GPUs, at the sizes that a table in ``kernels/settings.py`` names. All others take
a launch for each step.
"""

import torch

from gradkern.kernels import settings
from gradkern.ops import operators


def sizes(device_type: str, T: int, dtype: torch.dtype) -> range:
    """Return for how many numbers of T gradients one launch does the whole surgery."""
    implemented = device_type in operators.surgery.implementations
    return settings.one_launch(T, dtype.itemsize) if implemented else range(0)
