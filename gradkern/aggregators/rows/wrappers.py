"""The methods around another method, with MGDA within."""

from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.method import Laws, Method, Paper
from gradkern.aggregators.wrappers.normalized import Normalized
from gradkern.aggregators.wrappers.smoothed import Smoothed

DESIDERI = Paper("Désidéri", 2012, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization")
ZHOU = Paper("Zhou et al.", 2022, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond")

ROWS = (
    Method(
        "normalized-mgda",
        Normalized,
        "normalized_mgda",
        DESIDERI,
        Laws(degree=0, invariant="update", zero_row="ignored", single="direction"),
        {"aggregator": MGDA()},
    ),
    Method(
        "smoothed-mgda",
        Smoothed,
        "smoothed_mgda",
        ZHOU,
        Laws(zero_row="ignored"),
        {"aggregator": MGDA()},
        state=True,
    ),
)
