"""The first half of a step on several ranks: they agree on the step, and reduce their task gradients to shards."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkern.aggregators import Entrywise
from gradkern.distributed.agreement import Facts, digest, together
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import Reduction
from gradkern.gradients.graph import refuse_static_graph
from gradkern.gradients.layouts import Reach, Row, layouts_of, make_room
from gradkern.gradients.losses import Losses, Source, stacked
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.ops.capture import capturing
from gradkern.step.options import Options
from gradkern.step.shard_rows import ShardRows, buckets_for, shard_rows

LARGEST_UNIT = 4096
"""The largest block of a mask: parameters start at multiples of four blocks, and the gaps are sent too."""


class Start(NamedTuple):
    """What the ranks have agreed on before a step's first backward pass.

    Attributes:
        comm: the ranks.
        targets: the parameters.
        present: a flag for each task: whether any rank has a loss of it.
        plan: the places of parameters that are reduced while backward passes run; None if nobody knows yet which are
            shared.
    """

    comm: Comm
    targets: Targets
    present: list[bool]
    plan: tuple[int, ...] | None


def start(comm: Comm, source: Source, options: Options, needs_tensors: bool, opened: Callable[[], Targets]) -> Start:
    """Let all ranks open the step, and raise on all of them unless it is the same step everywhere.

    Args:
        comm: the ranks.
        source: the source of task gradients, which ``opened`` opens.
        options: the options.
        needs_tensors: whether the step needs each gradient as a tensor.
        opened: checks the arguments on this rank.
    """

    def open_here() -> Targets:
        comm.steps += 1
        targets = opened()
        _refuse_unsupported(options, needs_tensors)
        _refuse_targets(targets)
        if _is_new(comm, targets) and isinstance(source, Losses):
            _watch_for_static_graphs(source)
        return targets

    def facts(targets: Targets) -> Facts:
        is_new = _is_new(comm, targets)
        plans = _plans(comm, targets)
        return {
            "steps": comm.steps,
            "method": _method_digest(options),
            "tasks": len(source.present),
            "parameters": len(targets.tensors),
            "numbers": targets.layouts.numel,
            "layout": _layout_digest(targets),
            "groups": digest(targets.groups, targets.named),
            "first step": is_new,
            "values": _checksum(targets) if is_new else 0,
            "all present": all(source.present),
            "plans": digest(*sorted(plans.items())),
        }

    targets, of_ranks = together(comm, open_here, facts)
    _note(comm, targets)
    present = list(source.present)
    if not all(of_rank["all present"] for of_rank in of_ranks):
        present = [any(flags) for flags in zip(*comm.exchange_flags(source.present), strict=True)]
    plan = _plans(comm, targets).get(tuple(present))
    if len({of_rank["plans"] for of_rank in of_ranks}) > 1:
        plan = None
    if targets.named is not None:
        plan = tuple(k for k, is_shared in enumerate(targets.named) if is_shared)
    return Start(comm, targets, present, plan)


def reduced(source: Source, options: Options, begun: Start, units: tuple[int, ...] | None) -> ShardRows:
    """Return the shards of the step's rows.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
        units: the first unit of suppression of each parameter; None without suppression.
    """
    comm, targets, present, plan = begun
    T, suppression = len(present), options.suppression
    unit = 1 if suppression is None else suppression.block
    own: list[Row] = [[None] * len(targets.tensors)] * T

    def reduction_of(places: Sequence[int]) -> Reduction:
        return Reduction(comm, buckets_for(places, targets.layouts, comm, unit), T, targets.device)

    early = reduction_of(plan) if plan else None
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own, early))
    whole = targets.arranged(reach, None, units)
    if not whole.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    shared = tuple([c.place for c in whole.shared])
    plans = _plans(comm, targets)
    make_room(plans)
    plans[tuple(present)] = shared
    reductions = [] if early is None else [early]
    planned = frozenset(plan or ())
    late = [k for k in shared if k not in planned]
    if late:
        reductions.append(reduction_of(late))
        for t, row in enumerate(own):
            reductions[-1].take(t, row)
            own[t] = _without(row, late)
        reductions[-1].finish()
    rows = ShardRows(
        [],
        own,
        Arrangement([], 0, whole.n_segments),
        mask=None if suppression is None else suppression.mask(targets.device),
        products_masked=suppression is not None and suppression.scope == "all",
        present=bools_on(present, targets.device) if _tells_absent(options, present) else None,
        losses=mean_losses(comm, source.values, present, targets),
        comm=comm,
        targets=targets,
        whole=whole,
        reductions=reductions,
        own=own,
        unit=unit,
    )
    return shard_rows(rows)


def _passes(source: Source, targets: Targets, own: list[Row], early: Reduction | None) -> list[tuple[bool, ...]]:
    """Run the backward passes, and reduce what is planned; return which parameters each task reaches on this rank.

    Gradients that are not planned stay in ``own``. If a pass raises, zeros are reduced in place of the rows to come,
    because the other ranks wait for them.
    """
    reached = [(False,) * len(targets.tensors)] * len(own)
    try:
        if early is not None:
            early.skip([t for t, is_present in enumerate(source.present) if not is_present])
        for t, grads in source.passes(targets.tensors):
            row: Row = readable(grads, targets.tensors, targets.layouts)
            refuse_sparse(t, row, targets)
            reached[t] = tuple([g is not None for g in row])
            if early is not None:
                early.take(t, row)
                row = _without(row, early.buckets.places)
            own[t] = row
            del grads, row  # free them before the next task's pass
        refuse_switched(source, targets)
    except Exception:
        if early is not None:
            early.finish()
        raise
    if early is not None:
        early.finish()
    return reached


def agreed_reach(comm: Comm, targets: Targets, work: Callable[[], list[tuple[bool, ...]]]) -> Reach:
    """Run the backward passes; return the layouts of the rows' gradients, dense where any rank's task reaches.

    Args:
        comm: the ranks.
        targets: the n parameters.
        work: returns for each row and parameter whether this rank has a gradient.
    """
    rows, of_ranks = together(comm, work, lambda reached: {"reach": digest(*reached)})
    if len({of_rank["reach"] for of_rank in of_ranks}) > 1:
        n = len(targets.tensors)
        flags = [any(f) for f in zip(*comm.exchange_flags([f for row in rows for f in row]), strict=True)]
        rows = [tuple(flags[t * n : (t + 1) * n]) for t in range(len(rows))]
    return tuple([tuple([torch.strided if is_reached else None for is_reached in row]) for row in rows])


def mean_losses(comm: Comm, values: Sequence[Tensor | None], present: Sequence[bool], targets: Targets) -> Tensor:
    """Return the means of the losses over the ranks, (T,); NaN for a task that no rank has.

    A rank that lacks a task counts with a loss of 0, as it counts with a gradient of 0.
    """
    own = stacked(values, targets.tensors[0])
    there = bools_on([value is not None for value in values], own.device)
    means = comm.summed(torch.where(there, own, 0.0)) / comm.size
    return torch.where(bools_on(present, own.device), means, torch.nan).to(own.dtype)


def _refuse_unsupported(options: Options, needs_tensors: bool) -> None:
    """Raise NotImplementedError for what works on one rank only."""
    method = options.aggregator
    refused = {
        "memory=True": options.memory is not None,
        "compat=, which treats each gradient as another library does,": needs_tensors,
        f"second batch, as {type(method).__name__} needs": method.needs_second,
        f"mean of gradients over steps, as {type(method).__name__} keeps": method.averages_rows,
        f"{type(method).__name__}, which looks at entries of gradients": isinstance(method, Entrywise),
        f"Suppression with a block above {LARGEST_UNIT}": options.suppression is not None
        and options.suppression.block > LARGEST_UNIT,
    }
    for what, is_used in refused.items():
        if is_used:
            raise NotImplementedError(
                f"on several ranks there is no {what} yet. process_group=False lets each rank take a step of its own"
            )


def refuse_sparse(t: int, row: Row, targets: Targets) -> None:
    """Raise NotImplementedError if a gradient is sparse."""
    for k, g in enumerate(row):
        if g is not None and g.is_sparse:
            raise NotImplementedError(
                f"losses[{t}] has a sparse gradient for {targets.name(k)}: not on several ranks, make the layer with "
                "sparse=False"
            )


def refuse_switched(source: Source, targets: Targets) -> None:
    """Raise NotImplementedError if a callable has changed which parameters require grad, or their layouts."""
    if source.frozen_grads or layouts_of(targets.tensors) is not targets.layouts:
        raise NotImplementedError(
            "a callable of losses has switched requires_grad or changed a parameter's form: on several ranks do so "
            "before the step"
        )


def _refuse_targets(targets: Targets) -> None:
    if targets.layouts.lazy:
        raise NotImplementedError("params have no shapes yet: on several ranks run lazy modules once before the step")
    if capturing(targets.device):
        raise NotImplementedError("a step on several ranks cannot be captured in a CUDA graph: its hosts talk")


def _watch_for_static_graphs(losses: Losses) -> None:
    """Raise ValueError if the graph of a loss holds a DistributedDataParallel with a static graph; callables do later.

    It searches the graphs, so only the first step of some parameters does it.
    """

    def watched(i: int, loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        if isinstance(value, Tensor) and value.requires_grad:
            refuse_static_graph(f"losses[{i}]", value)
        return value

    for i, loss in enumerate(losses.entries):
        if isinstance(loss, Tensor):
            refuse_static_graph(f"losses[{i}]", loss)
        elif loss is not None:
            losses.entries[i] = partial(watched, i, loss)


def _tells_absent(options: Options, present: Sequence[bool]) -> bool:
    method = options.aggregator
    return (method.needs_losses or method.needs_present) and not all(present)


def _without(row: Row, places: Sequence[int]) -> Row:
    kept = list(row)
    for k in places:
        kept[k] = None
    return kept


def _plans(comm: Comm, targets: Targets) -> dict[tuple[bool, ...], tuple[int, ...]]:
    """Return the places of shared parameters by which tasks were present, as the last steps had them."""
    key = targets.layouts, targets.groups, targets.named
    if key not in comm.plans:
        make_room(comm.plans)
    return comm.plans.setdefault(key, {})


def _is_new(comm: Comm, targets: Targets) -> bool:
    first = targets.tensors[0]
    known = comm.params.get(id(first))
    return known is None or known() is not first


def _note(comm: Comm, targets: Targets) -> None:
    make_room(comm.params)
    comm.params[id(targets.tensors[0])] = ref(targets.tensors[0])


def _method_digest(options: Options) -> int:
    said = repr((options.aggregator, options.suppression, options.conflict_lr, options.memory is not None))
    return digest(re.sub(r" at 0x[0-9a-f]+", "", said))  # a generator's


def _layout_digest(targets: Targets) -> int:
    layouts = targets.layouts
    return digest(tuple(layouts.numels), tuple(layouts.strides), tuple(layouts.dtypes))


@torch.no_grad()
def _checksum(targets: Targets) -> int:
    """Return a number of 63 bits that differs if a parameter's bits do; the host reads the device for it, once."""
    total = torch.zeros((), dtype=torch.int64, device=targets.device)
    for k, p in enumerate(p for p in targets.given.tensors if not is_lazy(p)):
        x = (torch.view_as_real(p) if p.is_complex() else p).detach().contiguous().view(-1)
        total += (2 * k + 1) * x.view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64)
    return int(total)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
