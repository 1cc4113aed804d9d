"""GradDrop and the trimmed mean on the Triton back end."""

from collections.abc import Sequence

from torch import Tensor

from gradkern.kernels import graddrop as graddrop_kernel
from gradkern.kernels import trimmed_mean as trimmed_mean_kernel
from gradkern.ops import operators
from gradkern.ops.arguments import Coins, Mask, TaskGrads, addresses, numels
from gradkern.ops.capture import ready
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import tensor_layout
from gradkern.ops.triton.address_tables import table_rows
from gradkern.ops.triton.arguments import kept_counter, placed
from gradkern.ops.triton.backend import implements


@implements(operators.graddrop)
def graddrop(
    rows: TaskGrads,
    coins: Coins,
    coefficients: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write the gradients of one sign at each entry."""
    given = placed(rows, out, mask)
    sizes = tuple(numels(out, given.n))
    # The same tiles, numbered by positions.
    layout = tensor_layout(sizes, tuple(rows.segments), rows.n_segments, tuple(coins.positions), 1)
    positions = ready(layout, given.device).tiles_on(given.device)[1]
    if coefficients is not None:
        coefficients = coefficients.to(arithmetic_dtype(given.dtype)).contiguous()
    target = table_rows(addresses("out", out), given.n, given.dtype, given.device)
    graddrop_kernel.graddrop(
        given.rows,
        given.tiles,
        given.mask,
        graddrop_kernel.Coins(positions, coins.stream),
        coefficients,
        target,
        kept_counter(kept, mask),
    ).run(given.device)


@implements(operators.trimmed_mean)
def trimmed_mean(
    rows: TaskGrads,
    k: int,
    weights: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write the mean of the entries between the k largest and the k smallest."""
    given = placed(rows, out, mask)
    if weights is not None:
        weights = weights.to(arithmetic_dtype(given.dtype)).contiguous()
    target = table_rows(addresses("out", out), given.n, given.dtype, given.device)
    trimmed_mean_kernel.trimmed_mean(
        given.rows, given.tiles, given.mask, k, weights, target, kept_counter(kept, mask)
    ).run(given.device)
