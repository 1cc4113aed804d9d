"""Optimizers that do gradient surgery."""

from gradkern.optim.surgery import SurgeryOptimizer

__all__ = ["SurgeryOptimizer"]
