"""The methods on running means of the task gradients, and those whose weights move along two batches' gradients."""

from gradkern.aggregators.history.dbmtl import DBMTL
from gradkern.aggregators.history.mconfig import MConFIG
from gradkern.aggregators.history.moco import MoCo
from gradkern.aggregators.history.modo import MoDo
from gradkern.aggregators.history.sdmgrad import SDMGrad
from gradkern.aggregators.method import Laws, Method, Paper

FERNANDO = Paper(
    "Fernando et al.",
    2023,
    "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
)
LIN = Paper("Lin et al.", 2023, "Dual-Balancing for Multi-Task Learning")
LIU = Paper("Liu et al.", 2024, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks")
CHEN = Paper(
    "Chen et al.",
    2023,
    "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance",
)
XIAO = Paper(
    "Xiao et al.", 2023, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms"
)

ROWS = (
    Method("moco", MoCo, "moco", FERNANDO, Laws(degree=None, single="direction"), state=True),
    Method("dbmtl", DBMTL, "dbmtl", LIN, Laws(zero_row="ignored", single="direction"), state=True),
    Method("modo", MoDo, "modo", CHEN, Laws(degree=None), state=True, second=True),
    Method("sdmgrad", SDMGrad, "sdmgrad", XIAO, Laws(), state=True, second=True, compared={"lr": 0.1}),
    Method("mconfig", MConFIG, "mconfig", LIU, Laws(zero_row="ignored"), state=True),
)
