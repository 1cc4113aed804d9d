"""gradkern: the fast backend for gradient surgery in multi-task learning."""

from gradkern.aggregators import Aggregator, Constant, Mean, PCGrad, Sum
from gradkern.backward import backward
from gradkern.info import SurgeryInfo
from gradkern.ops import combine, gramian, project
from gradkern.optim import SurgeryOptimizer

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Constant",
    "Mean",
    "PCGrad",
    "Sum",
    "SurgeryInfo",
    "SurgeryOptimizer",
    "backward",
    "combine",
    "gramian",
    "project",
]
