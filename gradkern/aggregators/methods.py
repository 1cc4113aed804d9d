"""The methods, one row each. The package, the demo, the benchmark, the self-check and the tests read these rows.

A new method is its class, its naive twin in :mod:`gradkern.reference`, a row in ``rows/`` and a page in
``docs/methods``.
"""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.gradvac import GradVac
from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.method import Method
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.rows import attention, gramian, projections, weightings
from gradkern.aggregators.weightings.dwa import DWA
from gradkern.aggregators.weightings.famo import FAMO
from gradkern.aggregators.weightings.fixed import Constant, Mean, Sum
from gradkern.aggregators.weightings.geometric_mean import GeometricMean
from gradkern.aggregators.weightings.gradnorm import GradNorm
from gradkern.aggregators.weightings.rlw import RLW
from gradkern.aggregators.weightings.stch import STCH
from gradkern.aggregators.weightings.trained import IMTLL, Uncertainty

# The public classes, which ``gradkern`` exports too. METHODS and its types are imported by name.
__all__ = ["MGDA", "Constant", "GradAttention", "GradVac", "Mean", "PCGrad", "Sum"]
__all__ += ["DWA", "FAMO", "IMTLL", "RLW", "STCH", "GeometricMean", "GradNorm", "Uncertainty"]

METHODS: dict[str, Method] = {
    method.name: method for family in (weightings, projections, gramian, attention) for method in family.ROWS
}
"""The methods by name, in the order of the tables."""
