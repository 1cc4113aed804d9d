"""The first half of a step on several ranks: its task gradients become shards of the means over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradkern.distributed.agreement import digest, together
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import Reduction, by_place, in_memory
from gradkern.gradients.layouts import Reach, Row, layouts_of, make_room
from gradkern.gradients.losses import Source, stacked
from gradkern.gradients.memory import Memory, bools_on
from gradkern.gradients.param_grads import laid_out, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.step.begin import Start, plans_of
from gradkern.step.options import Options
from gradkern.step.shard_rows import ShardRows, buckets_for, laid_like, shard_rows


def reduced(
    source: Source, options: Options, begun: Start, units: tuple[int, ...] | None
) -> tuple[list[Row], ShardRows]:
    """Return the whole rows of a step with a memory, which it remembers, or none; and the shards of the step's rows.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
        units: the first unit of suppression of each parameter; None without suppression.
    """
    comm, targets, present, plan = begun
    suppression, T = options.suppression, len(present)
    unit = 1 if suppression is None else suppression.block
    own: list[Row] = [[None] * len(targets.tensors)] * T

    def reduction_of(places: Sequence[int]) -> Reduction:
        return Reduction(comm, buckets_for(places, targets.layouts, comm, unit), T, targets.device)

    early = reduction_of(plan) if plan else None
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own, early))
    reductions, shared, new = [] if early is None else [early], None, list[Row]()
    if options.memory is not None:
        assert early is not None, "all parameters are planned"
        new = _whole_rows(early, reach, targets)
        reach, shared = _recalled(options.memory, early, reach, begun)
    whole = targets.arranged(reach, shared, units)
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
        mask=None if suppression is None else suppression.mask(targets.device),
        products_masked=suppression is not None and suppression.scope == "all",
        present=bools_on(present, targets.device) if _tells_absent(options, present) else None,
        losses=mean_losses(comm, source.values, present, targets),
        overwrite=options.memory is None,
        comm=comm,
        targets=targets,
        whole=whole,
        reductions=reductions,
        own=own,
        unit=unit,
    )
    return new, shard_rows(rows)


def _whole_rows(reduction: Reduction, reach: Reach, targets: Targets) -> list[Row]:
    """Return the means over the ranks, whole: T rows of n gradients, None where no rank has one."""
    rows: list[Row] = []
    for t, kinds in enumerate(reach):
        if set(kinds) == {None}:
            rows.append([None] * len(kinds))
            continue
        vectors = by_place(reduction.buckets, reduction.gathered([shards[t] for shards in reduction.shards]))
        rows.append([None if kind is None else laid_like(k, vectors[k], targets) for k, kind in enumerate(kinds)])
    return rows


def _recalled(memory: Memory, reduction: Reduction, reach: Reach, begun: Start) -> tuple[Reach, tuple[bool, ...]]:
    """Put the absent tasks' remembered gradients into the shards; return the reach with them, and what is shared.

    Unshared parameters use no remembered gradients: an absent task's head stays unchanged.
    """
    targets, nothing = begun.targets, [[None] * len(begun.targets.tensors)] * len(reach)
    old = memory.recall(begun.present, nothing, targets.tensors, targets.layouts)
    known = [
        tuple([kind if g is None else torch.strided for kind, g in zip(kinds, row, strict=True)])
        for kinds, row in zip(reach, old, strict=True)
    ]
    shared = targets.are_shared(tuple(known))
    for t, row in enumerate(old):
        for piece in reduction.buckets.pieces(begun.comm.rank):
            g = row[piece.place]
            if g is not None and shared[piece.place]:
                whole = in_memory(laid_out(g, targets.tensors[piece.place]) if g.is_sparse else g)
                into = reduction.shards[piece.bucket][t, piece.at : piece.at + piece.numel]
                into.copy_(whole[piece.offset : piece.offset + piece.numel])
    with_old = [
        tuple([kind if is_shared else new for kind, new, is_shared in zip(kinds, news, shared, strict=True)])
        for kinds, news in zip(known, reach, strict=True)
    ]
    return tuple(with_old), shared


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


def _tells_absent(options: Options, present: Sequence[bool]) -> bool:
    method = options.aggregator
    told = options.memory is not None or method.needs_losses or method.needs_present
    return told and not all(present)


def _without(row: Row, places: Sequence[int]) -> Row:
    kept = list(row)
    for k in places:
        kept[k] = None
    return kept
