"""The methods on running means of the task gradients."""

from gradkern.aggregators.history.dbmtl import DBMTL
from gradkern.aggregators.history.mconfig import MConFIG
from gradkern.aggregators.history.moco import MoCo
from gradkern.aggregators.method import Laws, Method, Paper

FERNANDO = Paper(
    "Fernando et al.",
    2023,
    "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach",
)
LIN = Paper("Lin et al.", 2023, "Dual-Balancing for Multi-Task Learning")
LIU = Paper("Liu et al.", 2024, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks")

ROWS = (
    Method("moco", MoCo, "moco", FERNANDO, Laws(degree=None, single="direction"), state=True),
    Method("dbmtl", DBMTL, "dbmtl", LIN, Laws(zero_row="ignored", single="direction"), state=True),
    Method("mconfig", MConFIG, "mconfig", LIU, Laws(zero_row="ignored"), state=True),
)
