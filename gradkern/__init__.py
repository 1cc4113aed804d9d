"""gradkern: the fast backend for gradient surgery in multi-task learning."""

from gradkern.aggregators import Aggregator
from gradkern.aggregators import methods as _methods
from gradkern.aggregators.methods import *  # noqa: F403  # the methods' classes: a new one needs no edit here
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
    "Suppression",
    "SurgeryInfo",
    "SurgeryOptimizer",
    "backward",
    "combine",
    "gramian",
    "project",
]
__all__ += _methods.__all__
__all__.sort()
