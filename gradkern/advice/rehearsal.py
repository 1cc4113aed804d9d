"""Runs that change nothing: a step up to where it would write, and plain training's backward pass."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkern.gradients.engine import differentiated
from gradkern.gradients.losses import Losses, Source, unreached
from gradkern.gradients.param_grads import added
from gradkern.gradients.parameters import Params, Targets
from gradkern.step.notices import silent
from gradkern.step.options import Options
from gradkern.step.pipeline import run
from gradkern.step.sinks import Sink

SinkOf = Callable[[Source, Options], Sink]
"""A function that chooses the sink of a step."""


class _BeforeItWrites(Exception):
    """Ends a step where it would write. It puts back what it has changed by then, as whatever a step raises does."""


def rehearse(source: Source, sink_of: SinkOf, options: Options, params: Params) -> None:
    """Take a step up to where it would write.

    Args:
        source: the source of its task gradients.
        sink_of: chooses its sink.
        options: the method and its modifiers.
        params: as for :func:`gradkern.backward`.
    """
    sink = sink_of(source, options)

    def commit(step_scale: Tensor | None) -> NoReturn:
        raise _BeforeItWrites

    sink.commit = commit  # type: ignore[method-assign]
    with suppress(_BeforeItWrites):
        run(source, sink, options, params)


def plain(losses: Losses, targets: Targets, together: bool) -> None:
    """Compute the gradient of the sum of the losses.

    Args:
        losses: the losses, which keep their graphs.
        targets: the parameters.
        together: whether callables share one graph. If not, each has a backward pass of its own, as it has in training
            that keeps one graph at a time.

    Raises:
        ValueError: a callable's loss reaches no parameter.
    """
    losses.open(targets.device)
    params = [p for p in targets.tensors if not is_lazy(p)]
    total: Tensor | None = None
    sums: list[Tensor | None] = [None] * len(params)

    def add(value: Tensor) -> bool:
        """Add the gradient of a value to the sums; return whether it has one."""
        grads = differentiated("one of losses", (value,), params, True, (torch.ones_like(value),))
        for k, g in enumerate(grads):
            sums[k] = sums[k] if g is None else added(sums[k], g)
        return any(g is not None for g in grads)

    for i, value in losses.graphs():
        if callable(losses.entries[i]) and not together:
            if not add(value):
                raise unreached(i)
        else:
            with torch.enable_grad():
                term = value.reshape(())
                total = term if total is None else total + term
        del value  # frees a callable's graph
    if total is not None:
        add(total)


@contextmanager
def leaving_no_trace(device: torch.device) -> Iterator[None]:
    """Let steps within the block warn of nothing, and put the default generators of torch and Python back after it."""
    on_device = device.type != "cpu"
    devices, kind = ([device], device.type) if on_device else ([], "cuda")
    of_python = random.getstate()  # compat's PCGrad shuffles with it
    try:
        with silent(), torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(of_python)
