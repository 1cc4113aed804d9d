"""Running means of DTensors' task gradients: each rank has parts of them, and checkpoints have them whole."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.aggregators.history.averaged import aligned, checked, width
from gradkern.distributed.reduction import in_memory
from gradkern.gradients.layouts import new_grad_stride, real_numel
from gradkern.gradients.sharded import is_dtensor, part_of, parts_here, whole_grad


def whole_means(state: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Return the state of a method on means, with whole means in place of this rank's parts.

    All ranks must call it.

    Args:
        state: the method's ``state_dict``.
        params: the parameters of the steps.
    """
    here = parts_here(list(params))
    return _converted(state, params, here, [_whole(p) for p in params], whole_grad)


def means_here(state: Mapping[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Return the state of a method on means, with this rank's parts in place of the whole means.

    Raises:
        TypeError, ValueError: ``state`` has another form, or its means are of other parameters.
    """
    here = parts_here(list(params))
    return _converted(state, params, [_whole(p) for p in params], here, part_of)


def _converted(
    state: Mapping[str, Any],
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    convert: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Any]:
    """Return the state with other means.

    Args:
        state: the state.
        params: the parameters.
        before: tensors laid out as those of which the means are.
        after: tensors laid out as those of which the new means are.
        convert: returns the new mean, from the mean and its parameter.
    """
    new = dict(state)
    sizes = checked(state.get("_extra_state"))
    new["_extra_state"] = {
        name: [[k, real_numel(after[k]) if k < len(after) else n] for k, n in of_dtype.items()]
        for name, of_dtype in sizes.items()
    }
    for name, of_dtype in sizes.items():
        X = state.get(name)
        if any(k >= len(params) or n != real_numel(before[k]) for k, n in of_dtype.items()) or not _fits(X, of_dtype):
            raise ValueError(f"{name} in state_dict are not the means of these parameters' gradients")
        assert isinstance(X, Tensor), "it fits"
        columns, at = [], 0
        for k, numel in of_dtype.items():
            old = [_shaped(row[at : at + numel], before[k]) for row in X]
            columns.append(torch.stack([_flat(convert(g, params[k]), after[k]) for g in old]))
            at += aligned(numel)
        new[name] = torch.cat((X[:, :0], *columns), 1)
    return new


def _fits(X: object, of_dtype: Mapping[int, int]) -> bool:
    return isinstance(X, Tensor) and X.ndim == 2 and X.shape[1] == width(of_dtype)


def _whole(p: Tensor) -> Tensor:
    """Return a tensor without memory, of a parameter's shape and strides."""
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta") if is_dtensor(p) else p


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector's numbers as a gradient of a parameter, whose complex numbers are pairs."""
    shape = (*like.shape, 2) if like.is_complex() else tuple(like.shape)
    return vector.as_strided(shape, new_grad_stride(like))


def _flat(g: Tensor, like: Tensor) -> Tensor:
    """Return a gradient's numbers as a vector, as they lie in the memory of a new ``.grad``, with zeros behind them."""
    laid_out = torch.empty_strided(g.shape, new_grad_stride(like), dtype=g.dtype, device=g.device).copy_(g)
    return torch.nn.functional.pad(in_memory(laid_out), (0, aligned(g.numel()) - g.numel()))
