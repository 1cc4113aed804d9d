"""The methods whose weights solve a small problem posed by the Gramian."""

from gradkern.aggregators.gramian.aligned_mtl import AlignedMTL
from gradkern.aggregators.gramian.cagrad import CAGrad
from gradkern.aggregators.gramian.config import ConFIG
from gradkern.aggregators.gramian.dual_proj import DualProj
from gradkern.aggregators.gramian.fairgrad import FairGrad
from gradkern.aggregators.gramian.imtl_g import IMTLG
from gradkern.aggregators.gramian.krum import Krum
from gradkern.aggregators.gramian.mgda import MGDA
from gradkern.aggregators.gramian.nash_mtl import NashMTL
from gradkern.aggregators.gramian.ntkmtl import NTKMTL
from gradkern.aggregators.gramian.pcd import PCD
from gradkern.aggregators.gramian.rgw import RGW
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
IMTL = Paper("Liu et al.", 2021, "Towards Impartial Multi-task Learning")
ALIGNED = Paper("Senushkin et al.", 2023, "Independent Component Alignment for Multi-Task Learning")
CONFIG = Paper("Liu et al.", 2024, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks")
NASH = Paper("Navon et al.", 2022, "Multi-Task Learning as a Bargaining Game")
FAIR = Paper("Ban & Ji", 2024, "Fair Resource Allocation in Multi-Task Learning")
NTK = Paper(
    "Qin et al.",
    2025,
    "NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective",
)
KRUM = Paper("Blanchard et al.", 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent")
RANDOM = Paper(
    "Lin et al.", 2022, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning"
)
IGNORED = Laws(zero_row="ignored")

ROWS = (
    Method("mgda", MGDA, "mgda", SENER, IGNORED),
    Method("cagrad", CAGrad, "cagrad", LIU, Laws(single="direction")),
    Method("upgrad", UPGrad, "upgrad", QUINTON, Laws(no_conflict="mean")),
    Method("dualproj", DualProj, "dualproj", QUINTON, Laws(no_conflict="mean")),
    Method("pcd", PCD, "pcd_updates", PRIORITY, Laws(equivariant=False), state=True),
    Method("imtl-g", IMTLG, "imtl_g", IMTL, IGNORED),
    Method("aligned-mtl", AlignedMTL, "aligned_mtl", ALIGNED, IGNORED),
    Method("config", ConFIG, "config", CONFIG, IGNORED),
    # The laws are those of an update that is cut to the longest length allowed, as most are.
    Method(
        "nash-mtl",
        NashMTL,
        "nash_mtl",
        NASH,
        Laws(degree=None, invariant="update", zero_row="ignored", single="direction"),
    ),
    Method(
        "fairgrad",
        FairGrad,
        "fairgrad",
        FAIR,
        Laws(degree=0, invariant="update", zero_row="ignored", single="direction"),
    ),
    Method("ntkmtl", NTKMTL, "ntkmtl", NTK, IGNORED),
    Method("krum", Krum, "krum", KRUM, Laws(), arguments={"n_byzantine": 0, "n_selected": 2}, tasks=3),
    Method("rgw", RGW, "rgw", RANDOM, Laws(invariant="weights", equivariant=False), draws="weights"),
)
