"""Single entries of the gradients, read and written on the Triton back end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.kernels import entries
from gradkern.ops import operators
from gradkern.ops.arguments import OptionalTensors, addresses, sample
from gradkern.ops.capture import ready
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.layout import totals
from gradkern.ops.triton.address_tables import table_rows
from gradkern.ops.triton.backend import implements


@implements(operators.gather)
def gather(grads: OptionalTensors, numels: Sequence[int], index: Tensor) -> Tensor:
    """Return the entries at ``index``, (T, d), of gradients read in place."""
    like = sample(grads)
    device = like.device
    rows = table_rows(addresses("grads", grads), len(numels), like.dtype, device)
    values = torch.empty(rows.count, len(index), dtype=arithmetic_dtype(like.dtype), device=device)
    bounds = ready(totals(tuple(numels)), device).bounds_on(device)
    entries.gather(rows, bounds, index.contiguous(), values).run(device)
    return values


@implements(operators.scatter)
def scatter(values: Tensor, numels: Sequence[int], index: Tensor, out: Sequence[Tensor]) -> None:
    """Write ``values`` to the entries at ``index``; skip tensors without elements."""
    if values.shape != index.shape:
        raise ValueError(f"values must have the shape of index, {tuple(index.shape)}, got {tuple(values.shape)}")
    like = sample(out)
    device = like.device
    targets = addresses("out", [t if t.numel() else None for t in out])
    bounds = ready(totals(tuple(numels)), device).bounds_on(device)
    values = values.to(arithmetic_dtype(like.dtype)).contiguous()
    rows = table_rows(targets, len(numels), like.dtype, device)
    entries.scatter(values, bounds, index.contiguous(), rows).run(device)
