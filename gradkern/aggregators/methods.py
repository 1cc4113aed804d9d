"""The methods, one row each. The package, the demo, the benchmark, the self-check and the tests read these rows.

A new method is its class, its naive twin in :mod:`gradkern.reference`, a row in ``rows/`` and a page in
``docs/methods``.
"""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.entries.graddrop import GradDrop
from gradkern.aggregators.entries.trimmed_mean import TrimmedMean
from gradkern.aggregators.gradvac import GradVac
from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.method import Method
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.rows import attention, entries, gramian, projections, weightings
from gradkern.aggregators.weightings.scalarization import Constant, Mean, Sum

# The public classes, which ``gradkern`` exports too. METHODS and its types are imported by name.
__all__ = ["MGDA", "Constant", "GradAttention", "GradDrop", "GradVac", "Mean", "PCGrad", "Sum", "TrimmedMean"]

METHODS: dict[str, Method] = {
    method.name: method for family in (weightings, projections, gramian, attention, entries) for method in family.ROWS
}
"""The methods by name, in the order of the tables."""
