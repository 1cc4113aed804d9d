"""The losses of a step: checked, and turned into task gradients one backward pass after another."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from gradkern.arguments import listed
from gradkern.gradients import aliasing, graph
from gradkern.gradients.engine import differentiated
from gradkern.gradients.layouts import PLANS, Row, make_room

Loss = Tensor | Callable[[], Tensor] | None
Pass = tuple[int, Row]
"""The number of a task and its gradients, None for a target that it does not reach."""


class Source(Protocol):
    """A source of the task gradients of a step. A step opens it first."""

    def open(self, device: torch.device) -> None:
        """Check the source: it has at least one task present, and its gradients are on ``device``."""

    @property
    def present(self) -> list[bool]:
        """A flag for each task: whether it has a gradient in this step."""

    @property
    def values(self) -> list[Tensor | None]:
        """The losses of the tasks, detached, once their gradients have been computed; None where there is no loss."""

    @property
    def loss_scale(self) -> Tensor | None:
        """Return the scale of a gradient scaler that has multiplied the losses, (); None for none."""

    @property
    def frozen_grads(self) -> dict[int, dict[Tensor, Tensor]]:
        """By task, the gradients of parameters that are not among the targets, because they did not require grad."""

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Yield each present task's number and its gradients for ``targets``, one task after another.

        A gradient has the shape of its target. The step owns it: the result may be written over it, so a gradient that
        anything else needs is copied before (``aliasing.py``). A task that reaches no target is an error of the source.
        """


class Losses:
    """The losses of a step. Each task's gradients come from a backward pass of its own.

    Args:
        losses: one entry per task.
        retain_graph: keep all graphs.

    Attributes:
        entries: the losses as a list, after :meth:`open`.
        has_callables: whether one is a callable, which may change parameters while the step runs.
        present: as for :class:`Source`.
        values: as for :class:`Source`.
        loss_scale: as for :class:`Source`.
        differentiate: runs a backward pass, and returns the gradients.
        frozen: parameters that do not require grad when the step begins, and that a callable may let require it.
        frozen_grads: as for :class:`Source`.
    """

    one_graph_each = True
    """Whether each callable makes a graph of its own, so that only one graph is alive at a time."""

    def __init__(self, losses: Sequence[Loss], retain_graph: bool) -> None:
        self.given = losses
        self.retain_graph = retain_graph
        self.entries: list[Loss] = []
        self.has_callables = False
        self.present: list[bool] = []
        self.values: list[Tensor | None] = []
        self.loss_scale: Tensor | None = None
        self.device = torch.device("cpu")
        self.differentiate: Callable[..., Row] = differentiated
        self.frozen: Sequence[Tensor] = ()
        self.frozen_grads: dict[int, dict[Tensor, Tensor]] = {}

    def open(self, device: torch.device) -> None:
        """Check the losses, as far as possible before callables run.

        Raises:
            TypeError, ValueError: the losses are not a sequence, are empty, have no task present, or hold an entry that
                is not a loss on ``device``.
        """
        self.entries = entries_of("losses", self.given)
        self.has_callables = True in map(callable, self.entries)
        self.present = [loss is not None for loss in self.entries]
        self.values = [None] * len(self.entries)
        self.device = device
        if not self.entries:
            raise ValueError("losses is empty; an iterator is, once it has been used")
        if not any(self.present):
            raise ValueError(f"losses has no task present: {self.entries}")
        for i, loss in enumerate(self.entries):
            if loss is not None and not callable(loss):
                _check(i, loss, device)

    def passes(self, targets: Sequence[Tensor], keep: bool = True) -> Iterator[Pass]:
        """Run each present task's backward pass in turn. Each frees the part of its graph that no later pass needs.

        Args:
            targets: the tensors to differentiate with respect to.
            keep: whether the caller reads a gradient after it has asked for the next one. If not, no gradient is copied
                because something else needs it.
        """
        return self.weighted_passes(targets, None, keep)

    def weighted_passes(
        self, targets: Sequence[Tensor], weights: Sequence[float | Tensor] | None, keep: bool = True
    ) -> Iterator[Pass]:
        """Run :meth:`passes` with each task's loss times its weight; None for weights of 1.

        A weight is a number of the host, or a tensor of no dimension.
        """
        key = hash(tuple(map(id, targets)))
        free = self._freeable(key)
        for i, value in self.graphs():
            seed = torch.ones_like(value) if weights is None else _filled(value, weights[i])
            thawed = [p for p in self.frozen if p.requires_grad] if self.frozen else []
            reached = [*targets, *thawed] if thawed else targets
            grads = self.differentiate(f"losses[{i}]", (value,), reached, self.retain_graph or not free[i], (seed,))
            if not self._refuse_reentrant(i, value, key, grads):
                raise unreached(i)
            if keep or thawed:
                grads = aliasing.copies(grads)
            yield i, self._of_targets(i, grads, thawed) if thawed else grads
            del value, grads  # frees a callable's graph, and gradients that the caller does not keep

    def _freeable(self, key: int) -> list[bool]:
        """Return for each loss whether its own pass may free its graph: the last of those that share a part of it.

        A search of the graphs takes as long as the dot products of a small model. It is left out where all losses meet
        at the nodes where they met in an earlier step for the same targets.
        """
        tensors = tuple([i for i, loss in enumerate(self.entries) if isinstance(loss, Tensor)])
        if len(tensors) < 2:
            return [True] * len(self.entries)
        meetings = _meetings.get((tensors, key))
        if meetings is None or not graph.meet_again(self.entries, meetings):
            last, meetings = graph.clusters(self.entries)
            if len(meetings) < len(tensors) - 1:
                return [i == j for i, j in enumerate(last)]
            make_room(_meetings)
            _meetings[tensors, key] = meetings
        return [i == tensors[-1] or not isinstance(loss, Tensor) for i, loss in enumerate(self.entries)]

    def _refuse_reentrant(self, i: int, loss: Tensor, key: int, grads: Row) -> bool:
        """Raise ValueError if reentrant checkpointing hides targets from a pass; return whether it reached any.

        A search of the graph takes as long as the dot products of a small model. It is left out if one has been made
        for the same targets, reached and not, and for as many nodes: autograd numbers them. A checkpoint takes the
        place of all nodes of its function.
        """
        number = 0 if loss.grad_fn is None else loss.grad_fn._sequence_nr()
        made, _numbered.last = number - getattr(_numbered, "last", 0), number
        missed = tuple(map(is_, grads, repeat(None)))
        searched = hash((key, i, made, missed))
        if searched not in _searched:
            graph.refuse_reentrant(f"losses[{i}]", loss)
            make_room(_searched, 64 * PLANS)
            _searched.add(searched)
        return False in missed

    def _of_targets(self, i: int, grads: Row, thawed: Sequence[Tensor]) -> Row:
        """Return the gradients of the targets, and keep task ``i``'s of thawed parameters, which follow them."""
        n = len(grads) - len(thawed)
        of_thawed = zip(thawed, grads[n:], strict=True)
        self.frozen_grads[i] = {p: g for p, g in of_thawed if g is not None}
        return grads[:n]

    def graphs(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each present task's number and loss, with its graph; each callable runs when it is its turn."""
        for i, loss in enumerate(self.entries):
            if loss is None:
                continue
            if isinstance(loss, Tensor):
                self.values[i] = loss.detach()
                yield i, loss
                continue
            with torch.enable_grad():
                value = _check(i, loss(), self.device)
            self.values[i] = value.detach()
            yield i, value
            del value


_meetings: dict[tuple[tuple[int, ...], int], list[graph.Meeting]] = {}
"""The nodes where all losses met, by the losses' numbers and a hash of the targets' identities."""
_searched: set[int] = set()
"""Hashes of what has been searched for reentrant checkpointing."""
_numbered = threading.local()
"""The number of the last loss that the thread has differentiated."""


def _filled(like: Tensor, number: float | Tensor) -> Tensor:
    """Return a tensor full of a number, which the host does not read if it is a tensor."""
    if isinstance(number, Tensor):
        return torch.empty_like(like).copy_(number)
    return torch.full_like(like, number)


def unreached(i: int) -> ValueError:
    """Return the error for a loss that was computed from no trainable parameter."""
    return ValueError(f"losses[{i}] reaches no parameter: autograd has no gradient of it for any of params{_ABSENT}")


def entries_of(argument: str, losses: Any) -> list[Any]:
    """Return the losses as a list; raise TypeError if they are nothing whose order tells the tasks apart."""
    if isinstance(losses, list):  # as mostly, and the checker takes a microsecond
        return list(losses)
    return listed(argument, losses, "a sequence with one entry per task, such as a list")


_ABSENT = "; pass None for a task that is absent"


def _check(i: int, loss: object, device: torch.device) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"losses[{i}] must be a tensor, a callable that returns one, or None; got {loss!r}")
    if loss.numel() != 1:
        raise ValueError(f"losses[{i}] must have one element, got shape {tuple(loss.shape)}")
    if loss.layout is not torch.strided:
        raise TypeError(f"losses[{i}] must be dense, got layout {loss.layout}")
    if not loss.dtype.is_floating_point:
        raise TypeError(f"losses[{i}] must be floating, got {loss.dtype}")
    if loss.device != device:
        raise ValueError(f"losses[{i}] must be on the parameters' device, {device}; got {loss.device}")
    if not loss.requires_grad:
        raise ValueError(f"losses[{i}] reaches no parameter: it does not require grad{_ABSENT}")
    return loss


def stacked(losses: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return the losses, (T,), on ``like``'s device; float64 if any loss is, else float32; NaN for an absent task."""
    present = [loss for loss in losses if loss is not None]
    dtypes = {loss.dtype for loss in present}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if dtypes == {dtype} and len(present) == len(losses) and {loss.ndim for loss in present} == {0}:
        return torch.stack(present)  # the usual case
    absent = torch.full((), float("nan"), dtype=dtype, device=like.device)
    return torch.stack([absent if loss is None else loss.reshape(()).to(dtype) for loss in losses])


def unscaled(losses: Tensor, source: Source) -> Tensor:
    """Return the losses of a source as methods see them: without the scale of a gradient scaler."""
    return losses if source.loss_scale is None else losses / source.loss_scale


@contextmanager
def losses_named(name: str) -> Iterator[None]:
    """Let errors about ``losses``, as gradkern's own functions call the argument, speak of ``name``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        if message.startswith(("losses ", "losses[")):
            error.args = (message.replace("losses", name, 1),)
        raise
