"""Arrays of two kinds: a solver is written once, for NumPy arrays and for tensors.

On a CPU, NumPy takes a third of PyTorch's time for an operation on a few numbers, and a loop may look at its numbers
and end. On a device, and wherever a mode or a compiler watches, tensors stay tensors: the host reads nothing, loops run
a fixed number of rounds, and a mask keeps what is done. Both kinds have the operators, indexing and reductions that the
solvers need in common; the few functions that differ are here.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradkern.ops.limits import PATIENCE
from gradkern.ops.registry import is_watched

Array = Any
"""A NumPy array or a tensor. Numbers are float64."""

_PLAIN = (Tensor, torch.nn.Parameter)


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays as a function of tensors, which computes in NumPy where that is possible.

    Its first argument is a tensor. Among the others, tensors are on the same device, and all else is passed as it is.
    Floating tensors become float64, without a gradient. The result is float64, on the device of the first argument;
    or a tuple of such results.
    """

    quiet = np.errstate(all="ignore")(function)  # what is not finite stays so

    @wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        if not on_host(first):
            return function(_wide(first), *map(_wide, others))
        result = quiet(_numbers(first), *[_numbers(x) if isinstance(x, Tensor) else x for x in others])
        return tuple(map(torch.from_numpy, result)) if type(result) is tuple else torch.from_numpy(result)

    return call


def space(x: Array) -> Any:
    """Return the module with the functions for ``x``: numpy or torch. Only what both have alike is used of it."""
    return np if isinstance(x, np.ndarray) else torch


def on_device(x: Array) -> bool:
    """Return whether ``x`` is a tensor that is not on the CPU, where an operator may have a kernel for it."""
    return isinstance(x, Tensor) and x.device.type != "cpu"


def identity(K: Array, times: float = 1.0) -> Array:
    """Return the identity matrix of the size and kind of ``K`` (..., T, T), times a number; not to be written to."""
    T = K.shape[-1]
    if isinstance(K, np.ndarray):
        return _eye(T, times)
    eye = torch.eye(T, dtype=K.dtype, device=K.device)
    return eye if times == 1 else times * eye


def ones(x: Array) -> Array:
    """Return T ones of the kind of ``x`` (..., T). They must not be written to."""
    T = x.shape[-1]
    return _ones(T) if isinstance(x, np.ndarray) else torch.ones(T, dtype=x.dtype, device=x.device)


def positions(x: Array) -> Array:
    """Return 0 … T-1 of the kind of ``x`` (..., T), as floats. It must not be written to."""
    T = x.shape[-1]
    return _range(T) if isinstance(x, np.ndarray) else torch.arange(T, dtype=torch.float64, device=x.device)


def ascending(x: Array) -> Array:
    """Return the entries along the last dimension in ascending order."""
    return np.sort(x, -1) if isinstance(x, np.ndarray) else x.sort(-1).values


def positive(x: Array) -> Array:
    """Return the larger of each entry and 0; NaN stays."""
    return np.maximum(x, 0.0) if isinstance(x, np.ndarray) else x.clamp(min=0.0)


def largest(x: Array) -> Array:
    """Return the largest entry along the last dimension, (..., 1)."""
    return x.max(-1, keepdims=True) if isinstance(x, np.ndarray) else x.amax(-1, keepdim=True)


def lowest(x: Array, n: int) -> Array:
    """Return the mask of the n lowest entries along the last dimension, the first of equals."""
    if isinstance(x, np.ndarray):
        return x.argsort(-1, kind="stable").argsort(-1) < n
    return x.argsort(dim=-1, stable=True).argsort(-1) < n


def rounds(x: Array, n: int) -> range:
    """Return the rounds of a loop: n for tensors, and more where the loop ends as soon as it can."""
    return range(PATIENCE * n if isinstance(x, np.ndarray) else n)


def every(mask: Array) -> bool:
    """Return whether a mask is true everywhere, as far as the host may know: False for a tensor."""
    return isinstance(mask, np.ndarray) and np.count_nonzero(mask) == mask.size  # a sixth of the time of mask.all()


def none(mask: Array) -> bool:
    """Return whether a mask is true nowhere, as far as the host may know: False for a tensor."""
    return isinstance(mask, np.ndarray) and not np.count_nonzero(mask)


def solved(A: Array, B: Array) -> Array:
    """Return A⁻¹ B for symmetric positive definite matrices A (..., T, T), and B (..., T, k).

    A tensor's result is not a number where A is not positive definite. Cholesky's factorization and triangular systems
    are what PyTorch computes on a device without a word to the host; LU factors and all that builds on them may go
    through MAGMA in some versions, which waits.
    """
    if isinstance(A, np.ndarray):
        return lu_solved(A, B)
    factor, info = torch.linalg.cholesky_ex(A, check_errors=False)
    X = torch.linalg.solve_triangular(factor, B, upper=False)
    X = torch.linalg.solve_triangular(factor.mT, X, upper=True)
    return torch.where((info == 0)[..., None, None], X, torch.nan)


def lu_solved(A: Array, B: Array) -> Array:
    """Return A⁻¹ B for NumPy arrays; what is not finite where A is singular."""
    try:
        return np.linalg.solve(A, B)
    except np.linalg.LinAlgError:  # one of many matrices is singular; PyTorch goes on to the others
        return torch.linalg.solve_ex(torch.tensor(A), torch.tensor(B), check_errors=False).result.numpy()


def basic(G: Array, free: Array, R: Array, eye: Array) -> Array:
    """Return x (..., T, k) with G v - s = R, where v is 0 outside of ``free`` and s inside, as v inside and s outside.

    ``G`` (..., T, T) is symmetric and positive definite on ``free`` (..., T); ``eye`` is the identity matrix.
    """
    if isinstance(G, np.ndarray):
        return lu_solved(np.where(free[..., None, :], G, -eye), R)
    inside = free[..., None]
    both = inside & free[..., None, :]
    v = torch.where(inside, solved(torch.where(both, G, eye), torch.where(inside, R, 0.0)), 0.0)
    return torch.where(inside, v, G @ v - R)


def on_host(x: Tensor) -> bool:
    """Return whether ``x`` is a plain tensor with numbers on a CPU, and nothing watches what is done to it."""
    return x.is_cpu and type(x) in _PLAIN and not torch.compiler.is_compiling() and not is_watched()


def _wide(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return x.double() if x.is_floating_point() else x


def _numbers(x: Tensor) -> Any:
    numbers = x.numpy(force=True)
    return numbers if x.dtype is torch.float64 or not x.is_floating_point() else numbers.astype(np.float64)


@cache
def _eye(T: int, times: float) -> Array:
    return times * np.eye(T)


@cache
def _ones(T: int) -> Array:
    return np.ones(T)


@cache
def _range(T: int) -> Array:
    return np.arange(T, dtype=np.float64)
