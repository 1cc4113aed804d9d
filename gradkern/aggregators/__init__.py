"""Methods: from a Gramian to weights."""

from gradkern.aggregators.base import Aggregator
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.scalarization import Constant, Mean, Scalarization, Sum

__all__ = ["Aggregator", "Constant", "Mean", "PCGrad", "Scalarization", "Sum"]
