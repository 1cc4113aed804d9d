"""The methods, one row each. The package, the demo, the benchmark, the self-check and the tests read these rows.

A new method is its class, its naive twin in :mod:`gradkern.reference`, a row in ``rows/`` and a page in
``docs/methods``.
"""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.gradvac import GradVac
from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.history.dbmtl import DBMTL
from gradkern.aggregators.history.mconfig import MConFIG
from gradkern.aggregators.history.moco import MoCo
from gradkern.aggregators.method import Method
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.rows import attention, gramian, history, projections, weightings, wrappers
from gradkern.aggregators.weightings.scalarization import Constant, Mean, Sum
from gradkern.aggregators.wrappers.normalized import Normalized
from gradkern.aggregators.wrappers.smoothed import Smoothed

# The public classes, which ``gradkern`` exports too. METHODS and its types are imported by name.
__all__ = [
    "DBMTL",
    "MGDA",
    "Constant",
    "GradAttention",
    "GradVac",
    "MConFIG",
    "Mean",
    "MoCo",
    "Normalized",
    "PCGrad",
    "Smoothed",
    "Sum",
]

METHODS: dict[str, Method] = {
    method.name: method
    for family in (weightings, projections, gramian, wrappers, history, attention)
    for method in family.ROWS
}
"""The methods by name, in the order of the tables."""
