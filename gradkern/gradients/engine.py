"""Backward passes by autograd's engine, and what its errors mean."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradkern.gradients import graph
from gradkern.gradients.layouts import Row

Target = Tensor | GradientEdge
"""What a pass differentiates by: a leaf, or a place within the graph."""

_run_backward: Callable[..., Row] = torch.autograd.Variable._execution_engine.run_backward


def differentiated(
    name: str,
    outputs: Sequence[Target],
    targets: Sequence[Target],
    retain_graph: bool,
    grads: tuple[Tensor, ...],
    losses: Sequence[Tensor] = (),
) -> Row:
    """Return the gradients of ``outputs`` with respect to ``targets``, None for a target not reached.

    It runs the engine beneath ``torch.autograd.grad``, whose checks take 10 to 20 µs for a small model.

    Args:
        name: the outputs' name for error messages, such as "losses[0]".
        outputs: tensors, or places within the graphs of ``losses``.
        targets: what to differentiate by.
        retain_graph: whether to keep the graph.
        grads: the gradients with respect to the outputs.
        losses: the tensors that were computed through ``outputs``, if these are no tensors.
    """
    try:
        return _run_backward(tuple(outputs), grads, retain_graph, False, tuple(targets), True, accumulate_grad=False)
    except RuntimeError as error:
        if not _are_frozen(targets):
            raise_explained(name, losses or [x for x in outputs if isinstance(x, Tensor)], error)
            raise
    return _of_trainable(targets, lambda on: differentiated(name, outputs, on, retain_graph, grads, losses))


def differentiated_together(
    name: str, outputs: tuple[Tensor, ...], targets: Sequence[Tensor], retain_graph: bool, grads: Sequence[Tensor]
) -> Row:
    """Return the gradients of several tasks by one vectorized pass, each with a dimension of tasks in front.

    Args:
        name: as for :func:`differentiated`.
        grads: for each output the tasks' gradients with respect to it, with such a dimension too.
    """
    try:
        return torch.autograd.grad(
            outputs, targets, grads, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, TypeError, ValueError) as error:  # compiled kernels have errors of their own
        if not _are_frozen(targets):
            if graph.is_compiled(outputs) or any(sign in str(error) for sign in ("vmap", "Batching rule")):
                raise ValueError(
                    f"{name} cannot be differentiated for all tasks together, because the trunk is compiled or has an "
                    f"operation without a rule for torch.func.vmap: pass batched=False ({str(error).splitlines()[0]})"
                ) from error
            raise_explained(name, outputs, error)
            raise
    return _of_trainable(targets, lambda on: differentiated_together(name, outputs, on, retain_graph, grads))


def _are_frozen(targets: Sequence[Target]) -> bool:
    """Return whether a callable has frozen any of ``targets``, which autograd refuses before it runs anything."""
    return not all(map(_is_on, targets))


def _is_on(target: Target) -> bool:
    return isinstance(target, GradientEdge) or target.requires_grad


def _of_trainable(targets: Sequence[Any], run: Callable[[Sequence[Any]], Row]) -> Row:
    """Return what ``run`` returns for the targets that require grad, with None for the others."""
    on = [p for p in targets if _is_on(p)]
    grads = iter(run(on) if on else ())
    return [next(grads) if _is_on(p) else None for p in targets]


def raise_explained(name: str, outputs: Iterable[Tensor], error: Exception) -> None:
    """Raise an error that names the argument and the remedy in place of autograd's, if there is one.

    Raises:
        ValueError: a graph holds reentrant checkpointing, is freed, or is of compiled code that overwrites it.
    """
    for x in outputs:
        graph.refuse_reentrant(name, x)
    for sign, meaning in _MEANINGS.items():
        if sign in str(error):
            raise ValueError(f"{name} {meaning}") from error


_MEANINGS = {
    "donated buffer": "shares a compiled graph with another loss, and torch.compile has let backward overwrite its "
    "activations. Pass losses as callables, each with a forward pass of its own; or, before anything is compiled, set "
    "torch._functorch.config.donated_buffer = False and torch.compiler.config.cache_key_tag to a name of your own. "
    "Without that name torch's cache on disk returns the same code, with wrong gradients",
    "the graph a second time": "has a graph that an earlier backward pass has freed, and it cannot run a second time. "
    "Compute every loss anew in each step, a callable's by a forward pass of its own; or pass retain_graph=True to the "
    "pass that frees the graph",
}
"""The meanings of autograd's messages, by a part of each."""
