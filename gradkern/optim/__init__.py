"""Optimizers that do gradient surgery."""

from gradkern.gradients.accumulation import Accumulation
from gradkern.optim.adamw import AdamW
from gradkern.optim.surgery import SurgeryOptimizer

__all__ = ["Accumulation", "AdamW", "SurgeryOptimizer"]
