"""The methods that weigh losses."""

from typing import Any

from gradkern.aggregators.method import Laws, Method, Paper
from gradkern.aggregators.weightings.dwa import DWA
from gradkern.aggregators.weightings.famo import FAMO
from gradkern.aggregators.weightings.fixed import Constant, Mean, Sum
from gradkern.aggregators.weightings.geometric_mean import GeometricMean
from gradkern.aggregators.weightings.gradnorm import GradNorm
from gradkern.aggregators.weightings.rlw import RLW
from gradkern.aggregators.weightings.stch import STCH
from gradkern.aggregators.weightings.trained import IMTLL, Uncertainty

KURIN = Paper("Kurin et al.", 2022, "In Defense of the Unitary Scalarization for Deep Multi-Task Learning")
KENDALL = Paper(
    "Kendall et al.", 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"
)
ATTENTION = Paper("Liu et al.", 2019, "End-to-End Multi-Task Learning with Attention")
RANDOM = Paper(
    "Lin et al.", 2022, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning"
)
GEOMETRIC = Paper("Chennupati et al.", 2019, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy")
IMPARTIAL = Paper("Liu et al.", 2021, "Towards Impartial Multi-task Learning")
SMOOTH = Paper("Lin et al.", 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization")
FAST = Paper("Liu et al.", 2023, "FAMO: Fast Adaptive Multitask Optimization")
CHEN = Paper(
    "Chen et al.", 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks"
)

WEIGHTS = Laws(invariant="weights")
FIRST_SUM = Laws(invariant="weights", no_conflict="sum")
THREE: dict[str, Any] = {"arguments": {"T": 3}, "tasks": 3, "losses": True}

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
    Method("uncertainty", Uncertainty, "uncertainty", KENDALL, WEIGHTS, **THREE),
    Method("dwa", DWA, "dwa", ATTENTION, FIRST_SUM._replace(zero_row="ignored"), state=True, losses=True),
    Method("rlw", RLW, "rgw", RANDOM, Laws(invariant="weights", equivariant=False), draws="weights"),
    Method("geometric-mean", GeometricMean, "geometric_mean", GEOMETRIC, WEIGHTS, losses=True),
    Method("imtl-l", IMTLL, "imtl_loss", IMPARTIAL, FIRST_SUM, **THREE),
    Method("stch", STCH, "stch", SMOOTH, WEIGHTS, state=True, losses=True),
    Method("famo", FAMO, "famo", FAST, WEIGHTS, state=True, **THREE),
    Method("gradnorm", GradNorm, "gradnorm", CHEN, FIRST_SUM, state=True, **THREE),
)
