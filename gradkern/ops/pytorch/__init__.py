"""The PyTorch back end: it serves the CPU, and every device that has no back end of its own."""

from gradkern.ops.pytorch import (
    adamw,
    combination,
    entries,
    entrywise,
    gramian,
    host_programs,
    matrix_surgery,
    pcgrad_matrix,
)

__all__ = [
    "adamw",
    "combination",
    "entries",
    "entrywise",
    "gramian",
    "host_programs",
    "matrix_surgery",
    "pcgrad_matrix",
]
