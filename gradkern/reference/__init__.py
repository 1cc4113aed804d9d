"""Every method written naively on explicit vectors, as its paper says. The tests compare the fast code with it.

Nothing here is fast, and no code is shared with the code that it checks. Arithmetic is float64.
"""

from gradkern.reference.attention import attention_optimum, gradattention_updates
from gradkern.reference.fixed import mean, weighted_sum
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
    rlw,
    stch,
    uncertainty,
)

__all__ = [
    "Memory",
    "adamw",
    "attention_optimum",
    "combine",
    "cosine",
    "dwa",
    "famo",
    "famo_weights",
    "first_units",
    "geometric_mean",
    "gradattention_updates",
    "gradnorm",
    "gradvac",
    "gradvac_updates",
    "gramian",
    "imtl_loss",
    "kept",
    "mean",
    "mgda",
    "most_different",
    "most_similar",
    "partners",
    "pcgrad",
    "pcgrad_average",
    "pcgrad_of",
    "pcgrad_onto",
    "pcgrad_update",
    "philox",
    "project",
    "rlw",
    "stch",
    "step_scale",
    "suppressed",
    "uncertainty",
    "weighted_sum",
]
