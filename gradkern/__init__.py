"""gradkern: the fast backend for gradient surgery in multi-task learning."""

from gradkern.aggregators import Aggregator, Constant, GradAttention, GradVac, Mean, PCGrad, Sum
from gradkern.info import SurgeryInfo
from gradkern.modifiers.conflict_lr import ConflictLR
from gradkern.modifiers.suppression import Suppression
from gradkern.ops import combine, gramian, project
from gradkern.optim import SurgeryOptimizer
from gradkern.step.backward import backward

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "ConflictLR",
    "Constant",
    "GradAttention",
    "GradVac",
    "Mean",
    "PCGrad",
    "Sum",
    "Suppression",
    "SurgeryInfo",
    "SurgeryOptimizer",
    "backward",
    "combine",
    "gramian",
    "project",
]
