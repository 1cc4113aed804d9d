"""The surgery in one launch, which consists of this folder and ``kernels/surgery.py``.

The kernel serves few rows on NVIDIA's GPUs, at the sizes in a table of ``kernels/settings.py``. All others take
a launch for each step.
"""

import torch

from gradkern.kernels import settings
from gradkern.ops import operators


def sizes(device_type: str, T: int, dtype: torch.dtype) -> range:
    """Return the sizes of T gradients for which one launch does the whole surgery."""
    implemented = device_type in operators.surgery.implementations
    return settings.one_launch(T, dtype.itemsize) if implemented else range(0)
