"""The methods, one row each. The package, the demo, the benchmark, the self-check and the tests read these rows.

A new method is its class, its naive twin in :mod:`gradkern.reference`, a row in ``rows/`` and a page in
``docs/methods``.
"""

from gradkern.aggregators.attention.grad_attention import GradAttention
from gradkern.aggregators.entries.graddrop import GradDrop
from gradkern.aggregators.entries.trimmed_mean import TrimmedMean
from gradkern.aggregators.gradvac import GradVac
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
from gradkern.aggregators.history.dbmtl import DBMTL
from gradkern.aggregators.history.mconfig import MConFIG
from gradkern.aggregators.history.moco import MoCo
from gradkern.aggregators.history.modo import MoDo
from gradkern.aggregators.history.sdmgrad import SDMGrad
from gradkern.aggregators.method import Method
from gradkern.aggregators.pcgrad import PCGrad
from gradkern.aggregators.rows import attention, entries, gramian, history, projections, weightings, wrappers
from gradkern.aggregators.weightings.dwa import DWA
from gradkern.aggregators.weightings.famo import FAMO
from gradkern.aggregators.weightings.fixed import Constant, Mean, Sum
from gradkern.aggregators.weightings.geometric_mean import GeometricMean
from gradkern.aggregators.weightings.gradnorm import GradNorm
from gradkern.aggregators.weightings.rlw import RLW
from gradkern.aggregators.weightings.stch import STCH
from gradkern.aggregators.weightings.trained import IMTLL, Uncertainty
from gradkern.aggregators.wrappers.normalized import Normalized
from gradkern.aggregators.wrappers.smoothed import Smoothed

# The public classes, which ``gradkern`` exports too. METHODS and its types are imported by name.
__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "NTKMTL",
    "PCD",
    "RGW",
    "RLW",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "FairGrad",
    "GeometricMean",
    "GradAttention",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "MConFIG",
    "Mean",
    "MoCo",
    "MoDo",
    "NashMTL",
    "Normalized",
    "PCGrad",
    "SDMGrad",
    "Smoothed",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "Uncertainty",
]

METHODS: dict[str, Method] = {
    method.name: method
    for family in (weightings, projections, gramian, wrappers, history, attention, entries)
    for method in family.ROWS
}
"""The methods by name, in the order of the tables."""

ONE_BATCH = {name: method for name, method in METHODS.items() if not method.second}
"""Those whose step takes the losses of one batch."""
