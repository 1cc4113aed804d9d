"""The methods that combine the task gradients entry by entry."""

from gradkern.aggregators.entries.graddrop import GradDrop
from gradkern.aggregators.entries.trimmed_mean import TrimmedMean
from gradkern.aggregators.method import Laws, Method, Paper

CHEN = Paper(
    "Chen et al.",
    2020,
    "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
)
YIN = Paper("Yin et al.", 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates")

ROWS = (
    Method(
        "graddrop",
        GradDrop,
        "graddrop_updates",
        CHEN,
        Laws(no_conflict="sum", zero_row="ignored"),
        draws="signs",
        state=True,
    ),
    Method("trimmed-mean", TrimmedMean, "trimmed_mean", YIN, Laws(), arguments={"k": 1}, tasks=3),
)
