"""Optimizers that do gradient surgery."""

from gradkern.optim.adamw import AdamW
from gradkern.optim.surgery import SurgeryOptimizer

__all__ = ["AdamW", "SurgeryOptimizer"]
