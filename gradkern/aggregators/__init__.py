"""Methods: from a Gramian to weights."""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.base import Aggregator, Solution
from gradkern.aggregators.gradvac import GradVac
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.scalarization import Constant, Mean, Scalarization, Sum

__all__ = [
    "Aggregator",
    "Constant",
    "GradAttention",
    "GradVac",
    "Mean",
    "PCGrad",
    "Scalarization",
    "Solution",
    "Sum",
]
