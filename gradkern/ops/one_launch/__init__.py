"""The surgery in one launch, which consists of this folder and ``kernels/surgery.py``.

The kernel serves few rows on NVIDIA's GPUs, at the sizes in the device's table (``kernels/served.py``). All others take
a launch for each step.
"""

import torch

from gradkern.kernels.served import one_launch
from gradkern.ops import operators


def sizes(device: torch.device, T: int, dtype: torch.dtype) -> range:
    """Return the sizes of T gradients for which one launch does the whole surgery."""
    implemented = device.type in operators.surgery.implementations
    return one_launch(T, dtype.itemsize, device) if implemented else range(0)
