"""The first half of a step with DTensors: of its task gradients each rank gets parts of the means over the ranks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gradkern.aggregators import Entrywise
from gradkern.aggregators.history.averaged import Averaged
from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import mean_row
from gradkern.gradients.layouts import Reach, Row
from gradkern.gradients.losses import Losses, Source, losses_named
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.gradients.sharded import box_here, is_dtensor, n_replicas
from gradkern.step.begin import Start
from gradkern.step.gather import recalled, units_of, with_means
from gradkern.step.on_ranks import agreed_reach, refuse_sparse, refuse_switched, told
from gradkern.step.options import Options
from gradkern.step.part_rows import PartRows, cut, of_pieces
from gradkern.step.shard_rows import buckets_for, laid_like


def gathered_in_parts(source: Source, options: Options, begun: Start) -> tuple[list[Row], PartRows]:
    """Return the parts of the step's gradients that this rank holds, T rows of n, and the rows that it combines.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, second = begun
    new, reach = _parts(source, begun)
    taken, shared = (new, None) if options.memory is None else recalled(present, targets, new, options.memory)
    if options.memory is not None:
        reach = tuple(map(targets.layouts.reach_of, taken))
    if isinstance(options.aggregator, Averaged):
        shared = with_means(options.aggregator, targets, shared or targets.are_shared(reach))
    whole = targets.arranged(reach, shared, units_of(options, targets))
    if not whole.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    boxes = [box_here(p) for p in targets.tensors] if options.looks_at_positions else []
    rows = cut(
        PartRows(
            [],
            [],
            Arrangement([], 0, whole.n_segments),
            **told(source, options, begun, whole),
            parts=taken,
            replicas=[n_replicas(p, comm.size) for p in targets.tensors],
            boxes=[box for box in boxes if box is not None],  # the ranks have agreed that there is one of each
            align=_alignment(options),
        )
    )
    if second is None:
        return new, rows
    with losses_named("second"):
        return new, replace(rows, second=of_pieces(_parts(second, begun)[0], rows.pieces))


def _alignment(options: Options) -> int:
    """Return the number of elements at whose multiples random numbers begin: each four have a counter."""
    method, suppression = options.aggregator, options.suppression
    if suppression is not None:
        return 4 * suppression.block
    return 4 if isinstance(method, Entrywise) and method.looks_at_positions else 1


def _parts(source: Source, begun: Start) -> tuple[list[Row], Reach]:
    """Return this rank's parts of the means over the ranks of a source's gradients, T rows of n, and their layouts."""
    comm, targets, present, _, _ = begun
    own: list[Row] = [[None] * len(targets.tensors)] * len(present)
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own))
    return [_with_means(comm, targets, row, kinds) for row, kinds in zip(own, reach, strict=True)], reach


def _passes(source: Source, targets: Targets, own: list[Row]) -> list[tuple[bool, ...]]:
    """Run the backward passes, and put the gradients into ``own``; return which parameters each task reaches."""
    reached = [(False,) * len(own[0])] * len(own)
    # What a pass puts into ``.grad`` is nobody else's.
    passes = partial(source.passes, keep=False) if isinstance(source, Losses) else source.passes
    for t, grads in passes(targets.tensors):
        row = parts_of(grads, targets)
        refuse_sparse(t, row, targets)
        own[t], reached[t] = row, tuple([g is not None for g in row])
        del grads, row  # free them before the next task's pass
    refuse_switched(source, targets)
    return reached


def parts_of(grads: Row, targets: Targets) -> Row:
    """Return one task's gradients on this rank, each laid out as a new ``.grad`` of its parameter's part."""
    with torch.no_grad():
        return readable(grads, targets.here, targets.layouts)


def _with_means(comm: Comm, targets: Targets, row: Row, kinds: Sequence[object]) -> Row:
    """Return a row with means over the ranks in place of gradients of parameters that are no DTensors."""
    plain = [k for k, p in enumerate(targets.tensors) if kinds[k] is not None and not is_dtensor(p)]
    if not plain:
        return row
    means = mean_row(comm, buckets_for(plain, targets.layouts, comm), row, targets.device)
    return [laid_like(k, means[k], targets) if k in means else g for k, g in enumerate(row)]
