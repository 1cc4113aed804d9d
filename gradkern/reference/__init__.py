"""Every method written naively on explicit vectors, as its paper says. The tests compare the fast code with it.

Nothing here is fast, and no code is shared with the code that it checks. Arithmetic is float64.
"""

from gradkern.reference.attention import attention_optimum, gradattention_updates
from gradkern.reference.entries import chosen_signs, graddrop, graddrop_coins, graddrop_updates, trimmed_mean
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

__all__ = [
    "Memory",
    "adamw",
    "attention_optimum",
    "chosen_signs",
    "combine",
    "cosine",
    "first_units",
    "gradattention_updates",
    "graddrop",
    "graddrop_coins",
    "graddrop_updates",
    "gradvac",
    "gradvac_updates",
    "gramian",
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
    "step_scale",
    "suppressed",
    "trimmed_mean",
    "weighted_sum",
]
