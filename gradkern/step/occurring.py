"""Sparse gradients of embeddings as dense matrices of the rows that occur in a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.ops.dtypes import arithmetic_dtype


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
    ids, order = torch.cat([g._indices()[0] for g in present]).sort()
    numbers = torch.empty_like(ids)
    numbers[order] = (ids.diff(prepend=ids[:1]) != 0).cumsum(0)  # equal ids have one number
    of_tasks = iter(numbers.split([g._nnz() for g in present]))
    return [None if g is None else added_up(next(of_tasks), g._values(), n) for g in grads]


def added_up(index: Tensor, values: Tensor, n: int) -> Tensor:
    """Return a matrix of ``n`` rows to which ``values`` (N, d) are added at ``index`` (N,); float32 of 16-bit ones."""
    values = values.to(arithmetic_dtype(values.dtype))
    return torch.ops.aten.embedding_dense_backward(values, index, n, -1, False)
