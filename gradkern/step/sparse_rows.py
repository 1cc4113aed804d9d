"""Sparse gradients: their combination, and matrices of the rows that occur, which have their dot products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.gradients.embeddings import added_up, numbered
from gradkern.gradients.layouts import new_grad_stride
from gradkern.modifiers.suppression import MaskState
from gradkern.ops.philox import dropped_at


def rows_that_occur(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return sparse gradients of one parameter as dense tensors that have the same dot products.

    They have the rows that any of the gradients has, and some of zeros. If these are as many as the parameter's own, or
    the gradients are no sparse tensors of rows, they are whole. The host waits for no device.

    Args:
        grads: the T tasks' gradients, None for a task without one.
    """
    present = [g for g in grads if g is not None]
    n, V = sum(g._nnz() for g in present), len(present[0])
    if n >= V or any(g.sparse_dim() > 1 or g.dense_dim() != 1 for g in present):
        return [None if g is None else g.to_dense() for g in grads]
    numbers = numbered(torch.cat([g._indices()[0] for g in present]))
    of_tasks = iter(numbers.split([g._nnz() for g in present]))
    return [None if g is None else added_up(next(of_tasks), g._values(), n) for g in grads]


def combine_sparse(grads: Sequence[Tensor | None], w: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scaled entries of all tasks, concatenated; torch adds up equal indices when it coalesces.

    Args:
        grads: a parameter's T gradients.
        w: (T,), the weights.
        p: the parameter.
        dtype: of the result.
    """
    present = [(t, g) for t, g in enumerate(grads) if g is not None]
    indices = torch.cat([g._indices() for _, g in present], 1)
    values = torch.cat([torch.where(w[t] == 0, 0.0, w[t] * g._values().to(dtype)).to(dtype) for t, g in present])
    return torch.sparse_coo_tensor(indices, values, p.shape, device=values.device, check_invariants=False)


def drop_masked(g: Tensor, p: Tensor, unit: int, mask: MaskState) -> None:
    """Set the entries of a sparse gradient that a mask drops to 0; ``unit`` is the number of the first one of ``p``."""
    units = unit + _places(g._indices(), p) // mask.block
    g._values().masked_fill_(dropped_at(units, mask.state), 0.0)


def _places(indices: Tensor, p: Tensor) -> Tensor:
    """Return the positions of a sparse gradient's entries in a dense one's memory, in the shape of its values."""
    strides = new_grad_stride(p)
    n = len(indices)
    places = sum((i * stride for i, stride in zip(indices, strides[:n], strict=True)), torch.zeros_like(indices[0]))
    for size, stride in zip(p.shape[n:], strides[n:], strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device=indices.device)
    return places
