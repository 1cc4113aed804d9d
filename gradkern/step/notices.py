"""Warnings of steps whose surgery does nothing, or mixes numbers that belong to one task each.

They come once for a method, and before the step has changed anything. A step is looked at if it is the first of its
parameters with their arrangement. Only then the host reads the device, once, and in ``LOOKS`` steps at most.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from gradkern.aggregators import Aggregator, Scalarization
from gradkern.aggregators.history.averaged import Averaged
from gradkern.gradients.layouts import Looks, make_room
from gradkern.gradients.losses import Losses, Source
from gradkern.gradients.parameters import Targets
from gradkern.ops.capture import capturing
from gradkern.ops.registry import is_watched
from gradkern.step.options import Options
from gradkern.step.step_rows import StepRows
from gradkern.warn import warn_user

LOOKS = 4
"""The number of steps of one set of parameters that are looked at. Their arrangements differ."""
MOST_LOOKS = 100
"""The number of times that the host reads gradients of one kind of parameters. (Code that makes its parameters anew in
every step has a new set of them in every step.)"""
NAMED = 5
"""The number of parameters that a warning names."""
COVERED = 0.25
"""The least share of a parameter's entries that the tasks' own ones make up, if tasks lie side by side in it. (An
embedding, whose rows two small batches look up apart by chance, has far more rows than these.)"""
PIECE = 1 << 20
"""The number of entries that are counted at once."""

_warned: WeakKeyDictionary[Aggregator, set[str]] = WeakKeyDictionary()
"""The kinds of warnings that have come for a method."""
_silent = ContextVar("_silent", default=False)
"""Whether steps look at nothing."""


@contextmanager
def silent() -> Iterator[None]:
    """Let steps within the block warn of nothing, so that a later step warns as if they had not been."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


def look(source: Source, present: Sequence[bool], targets: Targets, options: Options, rows: StepRows) -> None:
    """Warn if the step's surgery does nothing, or mixes numbers that belong to one task each.

    Args:
        source: the source of the gradients.
        present: for each task, whether any rank has a gradient of it.
        targets: the parameters.
        options: the method and its modifiers.
        rows: the gradients.
    """
    method, first, arrangement = options.aggregator, targets.tensors[0], rows.of_params
    if isinstance(method, Scalarization) or _silent.get():
        return
    looks = targets.layouts.looks.get(id(first))
    if looks is None or looks.first() is not first:
        make_room(targets.layouts.looks)
        looks = targets.layouts.looks[id(first)] = Looks(ref(first), set())
    if arrangement in looks.arrangements or len(looks.arrangements) >= LOOKS:
        return
    n_present = present.count(True)
    recalls = isinstance(method, Averaged) and method.recalls_absent
    if options.memory is not None and not method.uses_memory and not recalls and n_present < len(present):
        warn_once(method, "memory", _memory_in_vain(method))
    elif n_present == 1 and options.memory is None and not recalls:
        if isinstance(source, Losses):
            warn_once(method, "one task", _one_task(len(present)))
    elif n_present > 1 and not any(len(c.tasks) > 1 for c in arrangement.shared):
        warn_once(method, "nothing shared", _nothing_shared(targets, rows))
    elif targets.named is None and targets.layouts.n_looks < MOST_LOOKS:
        if not _has_numbers(targets):
            return
        targets.layouts.n_looks += 1
        own = _own_entries(rows)
        if own:
            warn_once(method, "own entries", _mixed(targets, own))
    looks.arrangements.add(arrangement)


def warn_once(method: Aggregator, kind: str, text: str) -> None:
    """Warn of ``text``, once for a method and a kind of warning."""
    if _silent.get():
        return
    kinds = _warned.setdefault(method, set())
    if kind not in kinds:
        warn_user(text)
        kinds.add(kind)


def _one_task(n_tasks: int) -> str:
    given = "losses has one entry" if n_tasks == 1 else f"one of {n_tasks} tasks is present"
    return (
        f"there is no surgery with one task in a step, and in this step {given}. Give the losses of several tasks "
        "together. If tasks take turns: backward passes within SurgeryOptimizer.accumulate() are one step, and "
        "SurgeryOptimizer(..., memory=True) lets absent tasks take part with their last gradients, if the method uses "
        "them, as PCGrad does"
    )


def _memory_in_vain(method: Aggregator) -> str:
    return (
        f"memory=True changes nothing in this step, because {method!r} leaves absent tasks out of it. PCGrad, GradVac, "
        "GradAttention, GradDrop and TrimmedMean use remembered gradients. Or give the losses of all tasks together: "
        "backward passes within SurgeryOptimizer.accumulate() are one step"
    )


def _nothing_shared(targets: Targets, rows: StepRows) -> str:
    if targets.named is None:
        return (
            "there is no surgery in this step, because no parameter is reached by two losses: each gets the gradient "
            "of the one loss that reaches it. Is what the losses share frozen, detached, or missing in params?"
        )
    reached = "by two losses" if rows.of_params.shared else "by any loss"
    return (
        f"there is no surgery in this step, because no parameter of shared is reached {reached}. Are they frozen or "
        "detached, or are others meant?"
    )


def _mixed(targets: Targets, places: Sequence[int]) -> str:
    names = ", ".join(map(targets.name, places[:NAMED])) + (", …" if len(places) > NAMED else "")
    return (
        f"surgery mixes the tasks' gradients in {names}, which several losses reach. But in this step each entry there "
        "has a gradient of one task at most, as where the weights of all tasks are one tensor, or where their outputs "
        "are stacked. If the entries belong to one task each: name the parameters that the tasks share by shared=, or "
        "give each task a tensor of its own and compute its loss from that alone"
    )


def _has_numbers(targets: Targets) -> bool:
    """Return whether the host can read the gradients."""
    unreadable = targets.tensors[0].is_meta or is_watched() or torch.compiler.is_compiling()
    return not (unreadable or capturing(targets.device))


def _own_entries(rows: StepRows) -> list[int]:
    """Return the places of shared parameters whose entries have a gradient other than zero of one task at most.

    The entries belong to several tasks. Or the parameter belongs to one task, and another such one to another task.
    The host reads the device once.
    """
    columns = [(c, grads) for c, grads in rows.shared_grads() if len(grads) > 1 and c.numel > 0]
    if not columns:
        return []
    counts = iter(torch.cat([_counts(grads) for _, grads in columns]).tolist())
    side_by_side: list[int] = []
    of_one_task: dict[int, int] = {}
    for c, grads in columns:
        of_tasks = [next(counts) for _ in grads]
        owners = [t for t, count in zip(c.tasks, of_tasks, strict=True) if count > 0]
        if next(counts) > 1:
            continue
        if len(owners) == 1:
            of_one_task[c.place] = owners[0]
        elif sum(of_tasks) / c.numel >= COVERED * len(c.tasks) / rows.n_tasks and owners:
            side_by_side.append(c.place)
    return sorted([*side_by_side, *(of_one_task if len(set(of_one_task.values())) > 1 else ())])


def _counts(grads: Sequence[Tensor]) -> Tensor:
    """Return the number of each gradient's entries other than zero, and the greatest number of tasks at one entry.

    Pieces are counted one by one, so that it takes little memory.
    """
    in_memory = [g.as_strided((g.numel(),), (1,)) for g in grads]  # they are dense, and laid out alike
    counts = torch.stack([_counts_of_piece(piece) for piece in zip(*(g.split(PIECE) for g in in_memory), strict=True)])
    return torch.cat((counts[:, :-1].sum(0), counts[:, -1].amax(0, keepdim=True)))


def _counts_of_piece(grads: Sequence[Tensor]) -> Tensor:
    at_entry = torch.zeros(grads[0].shape, dtype=torch.int16, device=grads[0].device)
    counts = []
    for g in grads:
        nonzero = g != 0
        counts.append(nonzero.count_nonzero())
        at_entry += nonzero
    return torch.stack([*counts, at_entry.amax().long()])
