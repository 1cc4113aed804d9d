"""gradkern: the fast backend for gradient surgery in multi-task learning."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

if not Path(__file__).with_name("kernels").is_dir():
    # gradkern/kernels is a symlink to kernels/. A checkout without symlinks (Windows, a zip download) has a text file
    # in its place. The package is then made here, from the folder itself.
    _spec = ModuleSpec("gradkern.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).parents[1] / "kernels")]
    kernels = sys.modules["gradkern.kernels"] = module_from_spec(_spec)

from gradkern.advice.advice import Advice
from gradkern.advice.advise import advise
from gradkern.aggregators import Aggregator
from gradkern.aggregators import methods as _methods
from gradkern.aggregators.by_name import aggregator
from gradkern.aggregators.methods import *  # noqa: F403  # the methods' classes: a new one needs no edit here
from gradkern.gradients.masked_mean import masked_mean
from gradkern.info import SurgeryInfo
from gradkern.modifiers.conflict_lr import ConflictLR
from gradkern.modifiers.sketch import Sketch
from gradkern.modifiers.suppression import Suppression
from gradkern.ops import combine, gramian, project
from gradkern.optim import SurgeryOptimizer
from gradkern.step.backward import backward
from gradkern.version import __version__ as __version__

__all__ = [
    "Advice",
    "Aggregator",
    "ConflictLR",
    "Sketch",
    "Suppression",
    "SurgeryInfo",
    "SurgeryOptimizer",
    "advise",
    "aggregator",
    "backward",
    "combine",
    "gramian",
    "masked_mean",
    "project",
]
__all__ += _methods.__all__
__all__.sort()
