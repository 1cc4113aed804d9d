"""The first half of a step on several ranks: its task gradients become shards of the means over the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradkern.distributed.agreement import Facts, digest, together
from gradkern.distributed.by_rows import n_rows
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import Reduction
from gradkern.gradients.layouts import Reach, Row, layouts_of, make_room
from gradkern.gradients.losses import Source, losses_named, stacked, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.gradients.sharded import parts_here
from gradkern.step.begin import Start, plans_of
from gradkern.step.gather import rows_of, tells_absent, units_of
from gradkern.step.options import Options
from gradkern.step.shard_rows import ShardRows, buckets_for, laid_like, shard_rows
from gradkern.step.step_rows import StepRows


def gathered_on_ranks(
    source: Source, options: Options, begun: Start, by_rows: bool
) -> tuple[Targets, list[Row], StepRows]:
    """Return what :func:`gradkern.step.gather.gathered` returns: the rows are shards, unless the step needs them whole.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
        by_rows: whether the step takes each combined gradient's rows of this rank, where the ranks cut it by rows.
    """
    comm, targets, present, _, second = begun
    if not options.needs_whole_rows:
        return targets, [], _shards(source, options, begun, by_rows)
    with torch.no_grad():
        new = whole_rows(source, begun)
        losses = unscaled(mean_losses(comm, source.values, present, targets), source)
        rows = rows_of(present, (losses, source.loss_scale), targets, new, options)
        if second is None:
            return targets, new, rows
    with losses_named("second"):
        return targets, new, replace(rows, second=whole_rows(second, begun))


def _shards(source: Source, options: Options, begun: Start, by_rows: bool) -> ShardRows:
    """Return the shards of the step's rows."""
    comm, targets, present, plan, _ = begun
    units = units_of(options, targets)
    suppression, T = options.suppression, len(present)
    unit = 1 if suppression is None else suppression.block
    own: list[Row] = [[None] * len(targets.tensors)] * T
    # Rows begin within a mask's units, and kernels need pieces that begin with one.
    cut = [n_rows(p, comm.size) if by_rows and suppression is None else 0 for p in targets.tensors]

    def reduction_of(places: Sequence[int]) -> Reduction:
        return Reduction(comm, buckets_for(places, targets.layouts, comm, unit, cut), T, targets.device)

    early = reduction_of(plan) if plan else None
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own, early))
    reductions = [] if early is None else [early]
    whole = targets.arranged(reach, None, units)
    if not whole.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    places = tuple([c.place for c in whole.shared])
    plans = plans_of(comm, targets)
    make_room(plans)
    plans[tuple(present)] = places
    planned = frozenset(plan or ())
    late = [k for k in places if k not in planned]
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
        **told(source, options, begun, whole),
        reductions=reductions,
        own=own,
        unit=unit,
        rows=cut,
    )
    return shard_rows(rows)


def told(source: Source, options: Options, begun: Start, whole: Arrangement) -> dict[str, Any]:
    """Return what the rows of a step on several ranks have besides gradients, by the names of their attributes."""
    comm, targets, present, _, _ = begun
    suppression = options.suppression
    return {
        "mask": None if suppression is None else suppression.mask(targets.device),
        "products_masked": suppression is not None and suppression.scope == "all",
        "present": bools_on(present, targets.device) if tells_absent(present, options) else None,
        "losses": unscaled(mean_losses(comm, source.values, present, targets), source),
        "loss_scale": source.loss_scale,
        "comm": comm,
        "targets": targets,
        "whole": whole,
    }


def whole_rows(source: Source, begun: Start) -> list[Row]:
    """Return the means over the ranks of the rows, whole on every rank: T rows of n gradients, None where none is.

    Args:
        source: the source, opened.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, _ = begun
    n, T = len(targets.tensors), len(present)
    buckets = buckets_for(range(n), targets.layouts, comm)
    reduction = Reduction(comm, buckets, T, targets.device)
    own: list[Row] = [[None] * n] * T
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own, reduction))
    rows: list[Row] = []
    for t, kinds in enumerate(reach):
        row: list[Tensor | None] = [None] * n
        if set(kinds) != {None}:
            vectors = reduction.combined(t)
            row = [None if kind is None else laid_like(k, vectors[k], targets) for k, kind in enumerate(kinds)]
        rows.append(row)
    return rows


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


def agreed_reach(
    comm: Comm, targets: Targets, work: Callable[[], list[tuple[bool, ...]]], facts: Callable[[], Facts] = dict
) -> Reach:
    """Run the backward passes; return the layouts of the rows' gradients, dense where any rank's task reaches.

    Args:
        comm: the ranks.
        targets: the n parameters.
        work: returns for each row and parameter whether this rank has a gradient. With DTensors a rank that raises in
            it does so at once: the others wait for messages of the backward pass, and must get no other ones.
        facts: returns what else the ranks must have in common after it.
    """
    made = work() if targets.has_dtensors else None
    ready = work if made is None else lambda: made
    rows, of_ranks = together(comm, ready, lambda reached: {"reach": digest("reach", *reached), **facts()})
    return united(comm, rows, of_ranks)


def united(comm: Comm, rows: Sequence[tuple[bool, ...]], of_ranks: Sequence[Facts]) -> Reach:
    """Return the layouts of the rows' gradients, dense where any rank's task reaches.

    Args:
        comm: the ranks.
        rows: for each row and parameter, whether this rank has a gradient.
        of_ranks: the facts of all ranks; "reach" is the digest of their ``rows``.
    """
    if len({of_rank["reach"] for of_rank in of_ranks}) > 1:
        n = len(rows[0])
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
    if source.frozen_grads or layouts_of(parts_here(targets.tensors)) is not targets.layouts:
        raise NotImplementedError(
            "a callable of losses has switched requires_grad or changed a parameter's form: on several ranks do so "
            "before the step"
        )


def _without(row: Row, places: Sequence[int]) -> Row:
    kept = list(row)
    for k in places:
        kept[k] = None
    return kept
