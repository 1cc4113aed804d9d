"""The dtypes of gradients, and the dtypes of arithmetic on them."""

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that a gradient may be stored in."""


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
