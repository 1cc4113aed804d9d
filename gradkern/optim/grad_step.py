"""The second half of an update by ``.grad``: clipping and the step."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern.gradients.sharded import has_dtensors, is_dtensor, parts_here
from gradkern.info import SurgeryInfo


def refuse_closure(optimizer: Optimizer) -> None:
    """Raise TypeError if the optimizer's ``step`` needs an argument, as that of L-BFGS needs a closure."""
    kind = type(optimizer)
    if _needs_argument(kind.step):
        raise TypeError(
            f"update() calls step() without a closure, and {kind.__name__} needs one: call step(closure), with a "
            "closure that calls zero_grad() and backward(losses) and returns the sum of the losses"
        )


@lru_cache
def _needs_argument(step: Callable[..., Any]) -> bool:
    try:
        _, *others = inspect.signature(step).parameters.values()
    except ValueError:  # a function without a signature, or without an argument
        return False
    return any(o.default is o.empty and o.kind not in (o.VAR_POSITIONAL, o.VAR_KEYWORD) for o in others)


def loss_scale(scaler: torch.amp.GradScaler | None, params: Sequence[Tensor]) -> Tensor | None:
    """Return what a scaler multiplies losses by, on the parameters' device; None for nothing."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=params[0].device))  # the scale itself is not public without a wait


def step_by_grad(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    info: SurgeryInfo,
    max_norm: float | None,
    scaler: torch.amp.GradScaler | None,
) -> SurgeryInfo:
    """Clip every ``.grad``, step, and clear ``.grad``; return ``info``, with the norm before clipping."""
    if max_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        info = replace(info, total_norm=_clip(params, max_norm))
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    optimizer.zero_grad()
    return info


def _clip(params: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale every ``.grad`` such that the norm over all is ``max_norm`` at most, and return the norm before.

    Raises:
        TypeError: a ``.grad`` is sparse, for which torch has no norm.
    """
    given = [p for p in params if p.grad is not None]
    for p in given:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise TypeError(
                f"max_norm cannot clip the sparse gradient of a parameter of shape {tuple(p.shape)}: give no max_norm, "
                "or make the layer with sparse=False"
            )
    if not has_dtensors(given):
        return torch.nn.utils.clip_grad_norm_(given, max_norm)
    grads = [p.grad for p in given if p.grad is not None]
    norm = _norm(grads)
    torch._foreach_mul_(parts_here(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm over whole gradients, of which some are DTensors; torch has none over several meshes."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for g in grads:
        alike[(g.device_mesh, g.placements) if is_dtensor(g) else None].append(g)
    norms = [torch.nn.utils.get_total_norm(of_kind) for of_kind in alike.values()]
    return torch.linalg.vector_norm(torch.stack([n.full_tensor() if is_dtensor(n) else n for n in norms]))
