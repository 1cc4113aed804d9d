"""The methods that weigh losses without a look at gradients."""

from gradkern.aggregators.method import Laws, Method, Paper
from gradkern.aggregators.weightings.fixed import Constant, Mean, Sum

KURIN = Paper("Kurin et al.", 2022, "In Defense of the Unitary Scalarization for Deep Multi-Task Learning")

ROWS = (
    Method("sum", Sum, "weighted_sum", KURIN, Laws(invariant="weights", no_conflict="sum", zero_row="ignored")),
    Method("mean", Mean, "mean", KURIN, Laws(invariant="weights", no_conflict="mean")),
    Method(
        "constant",
        Constant,
        "weighted_sum",
        KURIN,
        Laws(invariant="weights", equivariant=False),
        arguments={"weights": (1.0, 2.32, 1.61)},
        tasks=3,
    ),
)
