"""The end of a Gramian piece in the one launch (``surgery.py``): the last piece of a segment solves the segment.

The pieces of a segment are folds of FOLD neighbours. The last program to finish a piece of a fold adds up the partial
sums of the fold; the last to finish a fold adds up those of all folds, writes M, and computes the segment's weights.

M is written to memory and the method reads it from there, one row at a time: in registers it would take those that
streaming needs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradvac import vaccinated
from .partial_sums import store_symmetric, sum_pairs
from .pcgrad import projected
from .work_queue import COUNTERS, FOUND, is_last, release


class KernelWork(NamedTuple):
    """The bundle of ``surgery.Work`` inside the kernel, with the partial sums."""

    p_segments: Any
    n_segments: Any
    n_pieces: Any
    n_folds: Any
    p_shared: Any
    o_flags: Any
    p_partials: Any
    p_folded: Any
    FOLD: tl.constexpr


class KernelProjection(NamedTuple):
    """The bundle of ``surgery.Projection`` inside the kernel.

    ``n_tasks`` is T as a run-time number: loops over it are not unrolled, because here that would gain nothing.
    """

    n_tasks: Any
    p_order_keys: Any
    s_order_keys: Any
    partner: Any
    p_targets: Any
    p_new_targets: Any
    beta: Any
    divisor: Any
    EPS: tl.constexpr


@triton.jit
def solve(i_segment, p_M, p_order_keys, projection, p_w, TASKS: tl.constexpr):
    """Weights of a segment from its M, by PCGrad, or with targets by GradVac, whose moved targets are put aside."""
    n_tasks = projection.n_tasks
    i_partner = tl.arange(0, TASKS)
    o_segment = i_segment * n_tasks * n_tasks
    p_M += o_segment
    if p_order_keys is not None:
        p_order_keys += i_segment * projection.s_order_keys
    w = tl.zeros((TASKS,), tl.float64)
    for i_task in range(n_tasks):
        if projection.p_targets is None:
            c = projected(p_M, p_order_keys, projection.partner, i_task, n_tasks, TASKS)
        else:
            matrices = (p_M, p_order_keys, projection.p_targets + o_segment)
            eps = tl.full((), projection.EPS, tl.float64)  # a literal would be rounded to float32
            c, targets = vaccinated(matrices, i_task, n_tasks, projection.beta, eps, TASKS)
            p_new_row = projection.p_new_targets + o_segment + i_task * n_tasks
            tl.store(p_new_row + i_partner, targets, mask=i_partner < n_tasks)
        w += c
    w = w / projection.divisor
    tl.store(p_w + i_segment * n_tasks + i_partner, w.to(p_w.dtype.element_ty), mask=i_partner < n_tasks)


@triton.jit(noinline=True)
def finish_piece(i_piece, i_segment, work, p_M, projection, p_w, T: tl.constexpr):
    """Count a piece whose partial sums are stored; with the last one of a segment, solve it and raise its flag.

    This function is called: inlined it would have the compiler keep its many addresses in registers while rows stream,
    at T = 3 in float32 some 20 registers more, for GradVac 50.
    """
    FOLD: tl.constexpr = work.FOLD
    PAIRS: tl.constexpr = T * (T + 1) // 2
    ROWS: tl.constexpr = triton.next_power_of_2(PAIRS)
    i_pair = tl.arange(0, ROWS)
    first_piece = tl.load(work.p_segments + 3 * i_segment)
    n_of_segment = tl.load(work.p_segments + 3 * i_segment + 1)
    first_fold = tl.load(work.p_segments + 3 * i_segment + 2)
    i_fold = (i_piece - first_piece) // FOLD
    i_first = first_piece + i_fold * FOLD
    n_of_fold = tl.minimum(first_piece + n_of_segment - i_first, FOLD)
    p_counters = work.p_shared + COUNTERS
    if is_last(p_counters + work.n_segments + first_fold + i_fold, n_of_fold):
        folded = sum_pairs(work.p_partials, work.n_pieces, i_first, n_of_fold, PAIRS, ROWS, FOLD)
        tl.store(work.p_folded + i_pair * work.n_folds + first_fold + i_fold, folded, mask=i_pair < PAIRS)
        n_folded = tl.cdiv(n_of_segment, FOLD)
        if is_last(p_counters + i_segment, n_folded):
            total = sum_pairs(work.p_folded, work.n_folds, first_fold, n_folded, PAIRS, ROWS, FOLD)
            finite = store_symmetric(p_M + i_segment * T * T, total, T, PAIRS, ROWS)
            if projection.p_targets is not None and not finite:
                tl.atomic_xchg(work.p_shared + FOUND, 1, sem="relaxed")
            tl.debug_barrier()  # other threads read M than wrote it
            solve(i_segment, p_M, projection.p_order_keys, projection, p_w, triton.next_power_of_2(T))
            release(work.p_shared + work.o_flags + i_segment)


@triton.jit
def move_targets(p_targets, p_new_targets, p_update_mask, n_segments, n_tasks):
    """Targets of the tasks of the update mask become what every segment put aside."""
    n = n_segments * n_tasks * n_tasks
    for o_start in range(0, n, 256):
        o = o_start + tl.arange(0, 256).to(tl.int64)
        m = tl.load(p_update_mask + o // n_tasks % n_tasks, mask=o < n, other=0) != 0
        tl.store(p_targets + o, tl.load(p_new_targets + o, mask=m, other=0.0, cache_modifier=".cg"), mask=m)
