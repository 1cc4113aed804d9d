"""The losses of a step: checked, and turned into task gradients one backward pass after another."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradkern import graph, held

Loss = Tensor | Callable[[], Tensor] | None


def checked(losses: Sequence[Loss], device: torch.device) -> list[Loss]:
    """``losses`` as a list, everything checked that can be told before a callable has run.

    Raises:
        TypeError, ValueError: not a sequence, empty, no task present, or an entry that is no loss.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a sequence with one entry per task, got {type(losses).__name__}")
    losses = list(losses)
    if not losses:
        raise ValueError("losses is empty")
    if all(loss is None for loss in losses):
        raise ValueError(f"losses has no task present: {losses}")
    for i, loss in enumerate(losses):
        if loss is not None and not callable(loss):
            _check(i, loss, device)
    return losses


def passes(
    losses: Sequence[Loss], targets: Sequence[Tensor], retain_graph: bool, weights: Sequence[float] | None = None
) -> Iterator[tuple[int, Tensor, Sequence[Tensor | None]]]:
    """Run each present task's backward pass in turn, its graph freed before the next as far as nobody needs it.

    Args:
        losses: as :func:`checked` gives them.
        targets: the tensors to differentiate by.
        retain_graph: keep all graphs.
        weights: what to scale each loss by before its pass; None for 1.

    Yields:
        The task's number, its loss, detached, and its gradients, None for a target it does not reach.
    """
    free = graph.freeable(losses)
    for i, loss in enumerate(losses):
        if loss is None:
            continue
        with torch.enable_grad():
            value = loss if isinstance(loss, Tensor) else _called(i, loss, targets[0].device)
            scaled = value if weights is None else weights[i] * value
        retain = retain_graph or not free[i]
        yield i, value.detach(), _gradients(i, scaled, targets, retain)
        del value, scaled  # a callable's graph ends here


def _called(i: int, loss: Callable[[], Tensor], device: torch.device) -> Tensor:
    value = _check(i, loss(), device)
    graph.refuse_reentrant(i, value)
    return value


def _gradients(i: int, loss: Tensor, targets: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
    try:
        grads = torch.autograd.grad(loss, targets, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise ValueError(
            f"losses[{i}] shares a compiled graph with another loss, and torch.compile has let backward overwrite its "
            "activations: set torch._functorch.config.donated_buffer = False, or pass losses as callables, each with "
            "a forward pass of its own"
        ) from error
    if all(g is None for g in grads):
        raise unreached(i)
    return held.copies(grads)


def unreached(i: int) -> ValueError:
    """The error for a loss that was computed from no trainable parameter."""
    return ValueError(f"losses[{i}] reaches no parameter: autograd has no gradient of it for any of params")


def _check(i: int, loss: object, device: torch.device) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"losses[{i}] must be a tensor, a callable that returns one, or None; got {loss!r}")
    if loss.numel() != 1:
        raise ValueError(f"losses[{i}] must have one element, got shape {tuple(loss.shape)}")
    if not loss.dtype.is_floating_point:
        raise TypeError(f"losses[{i}] must be floating, got {loss.dtype}")
    if loss.device != device:
        raise ValueError(f"losses[{i}] must be on the parameters' device, {device}; got {loss.device}")
    if not loss.requires_grad:
        raise ValueError(f"losses[{i}] reaches no parameter: it does not require grad")
    return loss


def stacked(losses: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """(T,) on the device of ``like``; float64 if any loss is, else float32; NaN for an absent task."""
    present = [loss for loss in losses if loss is not None]
    dtype = torch.float64 if any(loss.dtype == torch.float64 for loss in present) else torch.float32
    absent = torch.full((), float("nan"), dtype=dtype, device=like.device)
    return torch.stack([absent if loss is None else loss.reshape(()).to(dtype) for loss in losses])
