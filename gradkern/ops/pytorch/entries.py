"""Single entries of the gradients, taken out and put back, in PyTorch."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.arguments import OptionalTensors, sample
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.pytorch.backend import implements
from gradkern.ops.pytorch.blocks import flat


@implements(operators.gather)
def gather(grads: OptionalTensors, numels: Sequence[int], index: Tensor) -> Tensor:
    """Return (T, d), the entries of every task at ``index``; 0 where a task has no gradient."""
    n = len(numels)
    like = sample(grads)
    X = like.new_zeros((len(grads) // n, index.shape[0]), dtype=arithmetic_dtype(like.dtype))
    for k, part, positions in _pieces(numels, index):
        for row, g in zip(X, grads[k::n], strict=True):
            if g is not None:
                row[part] = flat(g)[positions].to(X.dtype)
    return X


@implements(operators.scatter)
def scatter(values: Tensor, numels: Sequence[int], index: Tensor, out: Sequence[Tensor]) -> None:
    """Write ``values[m]`` to entry ``index[m]`` of the consecutive tensors in ``out``."""
    for k, part, positions in _pieces(numels, index):
        if out[k].numel():
            flat(out[k])[positions] = values[part].to(out[k].dtype)


def _pieces(numels: Sequence[int], index: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield each tensor that has entries: its number, the slice of its entries in ``index``, their positions in it."""
    ends = list(accumulate(numels))
    cuts = [0, *torch.searchsorted(index, torch.tensor(ends, device=index.device)).tolist()]
    for k, (numel, end) in enumerate(zip(numels, ends, strict=True)):
        part = slice(cuts[k], cuts[k + 1])
        if part.start < part.stop:
            yield k, part, index[part] - (end - numel)
