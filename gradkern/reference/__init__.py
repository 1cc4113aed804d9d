"""Every method written naively on explicit vectors, as its paper says. The tests compare the fast code with it.

Nothing here is fast, and no code is shared with the code that it checks. Arithmetic is float64.
"""

from gradkern.reference.attention import attention_optimum, gradattention_updates
from gradkern.reference.entries import chosen_signs, graddrop, graddrop_coins, graddrop_updates, trimmed_mean
from gradkern.reference.fixed import mean, weighted_sum
from gradkern.reference.gramian_direct import krum, ntkmtl, rgw
from gradkern.reference.gramian_fair import fairgrad, nash_mtl
from gradkern.reference.gramian_quadratic import cagrad, dualproj, pcd_updates, upgrad
from gradkern.reference.gramian_spectral import aligned_mtl, config, imtl_g
from gradkern.reference.history import config_direction, dbmtl, mconfig, moco, modo, sdmgrad
from gradkern.reference.hull import mgda
from gradkern.reference.projections import (
    gradvac,
    gradvac_updates,
    most_different,
    most_similar,
    partners,
    pcgrad,
    pcgrad_average,
    pcgrad_of,
    pcgrad_onto,
    pcgrad_update,
)
from gradkern.reference.steps import Memory, adamw, step_scale
from gradkern.reference.suppression import first_units, kept, philox, suppressed
from gradkern.reference.vectors import combine, cosine, gramian, project
from gradkern.reference.weightings import (
    dwa,
    famo,
    famo_weights,
    geometric_mean,
    gradnorm,
    imtl_loss,
    stch,
    uncertainty,
)
from gradkern.reference.wrappers import normalized_mgda, smoothed_mgda

__all__ = [
    "Memory",
    "adamw",
    "aligned_mtl",
    "attention_optimum",
    "cagrad",
    "chosen_signs",
    "combine",
    "config",
    "config_direction",
    "cosine",
    "dbmtl",
    "dualproj",
    "dwa",
    "fairgrad",
    "famo",
    "famo_weights",
    "first_units",
    "geometric_mean",
    "gradattention_updates",
    "graddrop",
    "graddrop_coins",
    "graddrop_updates",
    "gradnorm",
    "gradvac",
    "gradvac_updates",
    "gramian",
    "imtl_g",
    "imtl_loss",
    "kept",
    "krum",
    "mconfig",
    "mean",
    "mgda",
    "moco",
    "modo",
    "most_different",
    "most_similar",
    "nash_mtl",
    "normalized_mgda",
    "ntkmtl",
    "partners",
    "pcd_updates",
    "pcgrad",
    "pcgrad_average",
    "pcgrad_of",
    "pcgrad_onto",
    "pcgrad_update",
    "philox",
    "project",
    "rgw",
    "sdmgrad",
    "smoothed_mgda",
    "stch",
    "step_scale",
    "suppressed",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "weighted_sum",
]
