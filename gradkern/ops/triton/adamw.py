"""AdamW along a combination of gradients on the Triton back end."""

import torch
from torch import Tensor

from gradkern.kernels import adamw as kernel
from gradkern.ops import operators
from gradkern.ops.arguments import AdamWState, AdamWStep, Mask, TaskGrads, addresses
from gradkern.ops.triton.address_tables import table_rows
from gradkern.ops.triton.arguments import kept_counter, placed, weights_of
from gradkern.ops.triton.backend import implements


@implements(operators.adamw)
def adamw(
    rows: TaskGrads,
    w: Tensor,
    state: AdamWState,
    step: AdamWStep,
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Take a step of AdamW along the combination of the gradients."""
    given = placed(rows, state.params, mask)
    device, moment = state.params[0].device, state.moments[0].dtype
    kernel.adamw(
        given.rows,
        given.tiles,
        given.mask,
        weights_of("w", w, moment, (rows.n_segments, rows.n_tasks)),
        kept_counter(kept, mask),
        kernel.AdamWState(
            table_rows(addresses("params", state.params), given.n, state.params[0].dtype, device),
            table_rows(addresses("moments", state.moments), given.n, moment, device),
            table_rows(addresses("steps", state.steps), given.n, torch.float32, device).source,
        ),
        kernel.AdamWStep(*step),
    ).run(device)
