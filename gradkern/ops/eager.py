"""The operators as plain function calls, for the step: the dispatcher takes 0.1 µs for every tensor of a list.

A call goes straight to the function that serves the tensors' device, unless something has to see the operator:
``torch.compile`` and other tracing, modes such as FakeTensorMode, transforms of ``torch.func``, and tensors that are
more than numbers in memory. Then, and where a list holds no tensor, it is the operator that is called.

Lists hold gradients as ``rows.readable`` leaves them. Arguments are positional, the first one a tensor or a list of
tensors; all else is as ``schema.py`` says.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gradkern.ops.one_launch import unfused
from gradkern.ops.pytorch import adamw as adamw_op
from gradkern.ops.pytorch import entries, host_programs, rows, suppressed
from gradkern.ops.registration import server

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))
"""Types of arguments, and of what is in lists of them, of which nobody has to be told."""


def _direct(name: str, like: Callable[P, R]) -> Callable[P, R]:
    """The operator ``name``, with the signature of ``like``, which serves it by default."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.gradkern, packet), overload or "default")

    @wraps(like)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _somebody_watches() or not all(map(_is_plain, args)):
            return op(*args, **kwargs)
        tensor = _first_tensor(args[0])
        if tensor is None or tensor.is_meta:
            return op(*args, **kwargs)
        return server(name, tensor.device.type)(*args, **kwargs)

    return call


def _somebody_watches() -> bool:
    """Whether a mode, a transform of ``torch.func`` or ``torch.jit.trace`` is active."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return modes or torch._C._is_tracing()


def _is_plain(argument: Any) -> bool:
    if isinstance(argument, Tensor):
        return type(argument) in _PLAIN and not argument.is_neg()
    return _PLAIN.issuperset(map(type, argument)) if isinstance(argument, list | tuple) else type(argument) in _PLAIN


def _first_tensor(argument: Any) -> Tensor | None:
    return argument if isinstance(argument, Tensor) else next((t for t in argument if t is not None), None)


gramian_tensors = _direct("gramian.tensors", rows.gramian_tensors)
gramian_masked = _direct("gramian.masked", suppressed.gramian_masked)
combine_tensors = _direct("combine.tensors", rows.combine_tensors)
combine_masked = _direct("combine.masked", suppressed.combine_masked)
gather = _direct("gather", entries.gather)
scatter = _direct("scatter", entries.scatter)
pcgrad = _direct("pcgrad", host_programs.pcgrad)
gradvac = _direct("gradvac", host_programs.gradvac)
pcgrad_tensors = _direct("pcgrad.tensors", unfused.pcgrad_tensors)
pcgrad_masked = _direct("pcgrad.masked", unfused.pcgrad_masked)
gradvac_tensors = _direct("gradvac.tensors", unfused.gradvac_tensors)
gradvac_masked = _direct("gradvac.masked", unfused.gradvac_masked)
adamw = _direct("adamw", adamw_op.adamw)
adamw_masked = _direct("adamw.masked", adamw_op.adamw_masked)
