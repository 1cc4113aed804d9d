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
    """(T, d), the entries of every task at ``index``; 0 where a task has no such gradient."""
    n = len(numels)
    like = sample(grads)
    X = like.new_zeros((len(grads) // n, index.shape[0]), dtype=arithmetic_dtype(like.dtype))
    for k, here, places in _pieces(numels, index):
        for row, g in zip(X, grads[k::n], strict=True):
            if g is not None:
                row[here] = flat(g)[places].to(X.dtype)
    return X


@implements(operators.scatter)
def scatter(values: Tensor, numels: Sequence[int], index: Tensor, out: Sequence[Tensor]) -> None:
    """Entry ``index[m]`` of the tensors in ``out``, one after another, becomes ``values[m]``."""
    for k, here, places in _pieces(numels, index):
        if out[k].numel():
            flat(out[k])[places] = values[here].to(out[k].dtype)


def _pieces(numels: Sequence[int], index: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """For each tensor that an entry lies in: its number, which of the entries these are, and where they lie in it."""
    ends = list(accumulate(numels))
    cuts = [0, *torch.searchsorted(index, torch.tensor(ends, device=index.device)).tolist()]
    for k, (numel, end) in enumerate(zip(numels, ends, strict=True)):
        here = slice(cuts[k], cuts[k + 1])
        if here.start < here.stop:
            yield k, here, index[here] - (end - numel)
