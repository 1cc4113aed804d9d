"""The methods whose weights solve a small problem posed by the Gramian."""

from gradkern.aggregators.gramian.cagrad import CAGrad
from gradkern.aggregators.gramian.dual_proj import DualProj
from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.gramian.pcd import PCD
from gradkern.aggregators.gramian.upgrad import UPGrad
from gradkern.aggregators.method import Laws, Method, Paper

SENER = Paper("Sener & Koltun", 2018, "Multi-Task Learning as Multi-Objective Optimization")
LIU = Paper("Liu et al.", 2021, "Conflict-Averse Gradient Descent for Multi-task Learning")
QUINTON = Paper("Quinton & Rey", 2024, "Jacobian Descent for Multi-Objective Optimization")
PRIORITY = Paper(
    None,
    None,
    "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective Optimization",
)

ROWS = (
    Method("mgda", MGDA, "mgda", SENER, Laws(zero_row="ignored")),
    Method("cagrad", CAGrad, "cagrad", LIU, Laws(single="direction")),
    Method("upgrad", UPGrad, "upgrad", QUINTON, Laws(no_conflict="mean")),
    Method("dualproj", DualProj, "dualproj", QUINTON, Laws(no_conflict="mean")),
    Method("pcd", PCD, "pcd_updates", PRIORITY, Laws(equivariant=False), state=True),
)
