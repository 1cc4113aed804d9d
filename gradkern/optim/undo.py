"""Undoing an update that raises: ``.grad``, κ, and the gradient scaler's record of it; and one that is skipped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern.gradients.parameters import why_unwritable
from gradkern.ops.undo import PutBack, nothing, numbers_of


def grads_of(params: Sequence[Tensor], changed: bool) -> PutBack:
    """Keep every ``.grad``.

    Args:
        params: the parameters.
        changed: whether something may be added to a ``.grad`` in place, so that its numbers are kept too.
    """
    grads = [p.grad for p in params]
    pairs = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None] if changed else []
    numbers = [numbers_of(g) for p, g in pairs if why_unwritable(g, p) is None]

    def put_back() -> None:
        for p, g in zip(params, grads, strict=True):
            if p.grad is not g:
                p.grad = g
        for put_numbers_back in numbers:
            put_numbers_back()

    return put_back


def scale_of(pending: SimpleNamespace) -> PutBack:
    """Keep κ, which waits for a step."""
    step_scale = pending.step_scale

    def put_back() -> None:
        pending.step_scale = step_scale

    return put_back


@contextmanager
def undone_if_skipped(
    scaler: torch.amp.GradScaler | None, optimizer: Optimizer, states: Sequence[PutBack]
) -> Iterator[None]:
    """Put states back if a scaler's block ends without a step of the optimizer: the scaler has skipped it.

    An optimizer that takes the scale itself, as fused ones of torch do outside of a wrapper, is called in any case. The
    host does not know then whether it has stepped, and nothing is put back.
    """
    if scaler is None:
        yield
        return
    steps: list[bool] = []
    hook = optimizer.register_step_pre_hook(lambda *_: steps.append(True))
    try:
        yield
    finally:
        hook.remove()
    if not steps:
        for put_back in states:
            put_back()


def stage_of(scaler: torch.amp.GradScaler | None, optimizer: Optimizer) -> PutBack:
    """Keep what a gradient scaler has noted about an optimizer since its last ``update``: whether it has unscaled.

    Otherwise it would not unscale the gradients of the next attempt. It has no public access to this record.
    """
    stages = getattr(scaler, "_per_optimizer_states", None)
    if stages is None:  # there is no scaler, or it is disabled
        return nothing
    key = id(optimizer)
    before = dict(stages[key]) if key in stages else None

    def put_back() -> None:
        if before is None:
            stages.pop(key, None)
        else:
            stages[key] = before

    return put_back
