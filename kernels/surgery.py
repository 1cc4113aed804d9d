"""The whole surgery in one launch, for few rows: Gramian, method and combination, as pieces of work to be shared out.

    M[s] = J_s J_s^T,   w[s] = sum_i C(M[s])_i,   out[e] = sum_t w[s, t] J[t, e]      s the segment of e

The programs stay and draw tickets (``tickets.py``), each of which is a piece of the work list: run through some tiles
for the Gramian of a segment, or combine them. The last of each FOLD pieces of a segment adds up their partial sums; the
last of these groups adds up the groups', solves the segment, and raises its flag, for which its combination waits. Both
sums are in float64 and in a fixed order, so that the same input gives the same bits, whoever comes last.

M is written to memory and read from there by the method, one row at a time: in registers it would take those that
streaming needs. What another program has written is read past the first cache, which does not hear of it.
"""
# ruff: noqa: RUF005 (tuples grow by "+", the only way that Triton compiles)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradvac import vaccinated
from .gramian import sum_products
from .launch import Launch, kernel
from .masks import DENSE, Mask, kept, load_state, load_units, mask_arguments, to_read
from .pcgrad import partner_arguments, projected
from .rows import Rows, load_full, load_part, load_tile, row_address, row_arguments, store_row
from .settings import FOLD, gramian_setting
from .tickets import COUNTERS, FOUND, LEFT, LINE, clear, draw, is_last, release, wait_for


@triton.jit
def sums(p, s_pair, i_first, n, PAIRS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr):
    """(ROWS,) float64, of each pair the sum of the ``n`` numbers from ``i_first`` on; ROWS is PAIRS or more."""
    i_pair = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, FOLD), tl.float64)
    for o_start in range(0, n, FOLD):
        o = o_start + tl.arange(0, FOLD)
        m = (i_pair < PAIRS)[:, None] & (o < n)[None, :]
        x = tl.load(p + i_pair[:, None] * s_pair + (i_first + o)[None, :], mask=m, other=0.0, cache_modifier=".cg")
        acc += x.to(tl.float64)
    return tl.sum(acc, 1)


@triton.jit
def store_symmetric(p_M, total, T: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr):
    """Write M (T, T) from its pairs, (i, j) with j <= i being number i (i + 1) / 2 + j; whether all are finite."""
    i_pair = tl.arange(0, ROWS)
    i = tl.zeros_like(i_pair)
    for row in tl.static_range(1, T):
        i += (i_pair >= row * (row + 1) // 2).to(tl.int32)
    j = i_pair - i * (i + 1) // 2
    M = total.to(p_M.dtype.element_ty)
    tl.store(p_M + i * T + j, M, mask=i_pair < PAIRS)
    tl.store(p_M + j * T + i, M, mask=i_pair < PAIRS)
    return tl.sum((M - M != 0).to(tl.int32), 0) == 0


@triton.jit
def solve(
    i_segment,
    p_M,
    p_keys,
    s_keys,
    partner,
    p_targets,
    p_moved,
    beta,
    p_present,
    divisor,
    p_w,
    n_tasks,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of a segment from its M, by PCGrad, or with targets by GradVac, whose moved targets are put aside.

    ``n_tasks`` is T as a run-time number: loops over it are not unrolled, for what they would win is nothing here.
    """
    i_partner = tl.arange(0, BLOCK)
    o_segment = i_segment * n_tasks * n_tasks
    p_M += o_segment
    if p_keys is not None:
        p_keys += i_segment * s_keys
    w = tl.zeros((BLOCK,), tl.float64)
    for i_task in range(n_tasks):
        if p_targets is None:
            c = projected(p_M, p_keys, partner, i_task, n_tasks, BLOCK)
        else:
            c, targets = vaccinated(p_M, p_keys, p_targets + o_segment, i_task, n_tasks, beta, EPS, BLOCK)
            tl.store(p_moved + o_segment + i_task * n_tasks + i_partner, targets, mask=i_partner < n_tasks)
        if p_present is not None:
            c = tl.where(tl.load(p_present + i_task) != 0, c, 0.0)
        w += c
    w = w / divisor
    tl.store(p_w + i_segment * n_tasks + i_partner, w.to(p_w.dtype.element_ty), mask=i_partner < n_tasks)


@triton.jit(noinline=True)
def finish_piece(
    i_piece,
    i_segment,
    p_segments,
    n_segments,
    n_pieces,
    n_groups,
    p_shared,
    o_flags,
    p_partials,
    p_folded,
    p_M,
    n_tasks,
    p_keys,
    s_keys,
    partner,
    p_targets,
    p_moved,
    beta,
    p_present,
    divisor,
    p_w,
    T: tl.constexpr,
    FOLD: tl.constexpr,
    EPS: tl.constexpr,
):
    """Count a piece whose partial sums are stored; with the last one of a segment, solve it and raise its flag.

    Called, for inlined it would have the compiler keep its many addresses in registers while rows stream: at T = 3 in
    float32 some 20 registers more, for GradVac 50.
    """
    PAIRS: tl.constexpr = T * (T + 1) // 2
    ROWS: tl.constexpr = triton.next_power_of_2(PAIRS)
    i_pair = tl.arange(0, ROWS)
    first_piece = tl.load(p_segments + 3 * i_segment)
    n_of_segment = tl.load(p_segments + 3 * i_segment + 1)
    first_group = tl.load(p_segments + 3 * i_segment + 2)
    i_group = (i_piece - first_piece) // FOLD
    i_first = first_piece + i_group * FOLD
    n_of_group = tl.minimum(first_piece + n_of_segment - i_first, FOLD)
    p_counters = p_shared + COUNTERS
    if is_last(p_counters + n_segments + first_group + i_group, n_of_group):
        folded = sums(p_partials, n_pieces, i_first, n_of_group, PAIRS, ROWS, FOLD)
        tl.store(p_folded + i_pair * n_groups + first_group + i_group, folded, mask=i_pair < PAIRS)
        n_folded = tl.cdiv(n_of_segment, FOLD)
        if is_last(p_counters + i_segment, n_folded):
            total = sums(p_folded, n_groups, first_group, n_folded, PAIRS, ROWS, FOLD)
            finite = store_symmetric(p_M + i_segment * T * T, total, T, PAIRS, ROWS)
            if p_targets is not None and not finite:
                tl.atomic_xchg(p_shared + FOUND, 1, sem="relaxed")
            tl.debug_barrier()  # other threads read M than wrote it
            solve(
                i_segment,
                p_M,
                p_keys,
                s_keys,
                partner,
                p_targets,
                p_moved,
                beta,
                p_present,
                divisor,
                p_w,
                n_tasks,
                EPS,
                triton.next_power_of_2(T),
            )
            release(p_shared + o_flags + i_segment)


@triton.jit
def move_targets(p_targets, p_moved, p_moving, n_segments, n_tasks):
    """Targets of the tasks that are moving become what every segment put aside."""
    n = n_segments * n_tasks * n_tasks
    for o_start in range(0, n, 256):
        o = o_start + tl.arange(0, 256).to(tl.int64)
        m = tl.load(p_moving + o // n_tasks % n_tasks, mask=o < n, other=0) != 0
        tl.store(p_targets + o, tl.load(p_moved + o, mask=m, other=0.0, cache_modifier=".cg"), mask=m)


@triton.jit
def combine_piece(
    i_first,
    n_tiles,
    i_segment,
    n_segments,
    p_tiles,
    p_rows,
    s_row,
    p_w,
    p_plain,
    p_out,
    s_out,
    p_units,
    p_state,
    block,
    p_count,
    T: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ONCE: tl.constexpr,
):
    """The weighted sum of ``n_tiles`` tiles from ``i_first`` on, the last one first: that is still in the cache.

    As ``combine.py``, but for few rows, and a block of the Gramian's size at a time: a whole tile takes more registers.
    """
    o_block = tl.arange(0, BLOCK)
    state = load_state(p_state, GROUP)
    n_kept = tl.zeros((BLOCK,), tl.int32)
    w = ()
    for t in tl.static_range(T):
        plain = 1.0 if p_plain is None else tl.load(p_plain + t)
        m_under = i_segment < n_segments
        w = w + (tl.load(p_w + i_segment * T + t, mask=m_under, other=plain, cache_modifier=".cg"),)
    for i_back in range(n_tiles):
        i_tile = i_first + n_tiles - 1 - i_back
        i_tensor, o_first, n, _i_segment = load_tile(p_tiles, i_tile)
        units = load_units(p_units, i_tile, state, GROUP, ONCE)
        a_out = row_address(p_out, s_out, 0, i_tensor, o_first, True, TABLE_OUT, D)
        low = (n ^ TILE) | (a_out & 15)  # any bit left in it sends the tile down the slow road
        a = ()
        for t in tl.static_range(T):
            a_row = row_address(p_rows, s_row, t, i_tensor, o_first, True, TABLE, D)
            a_row = tl.where(w[t] != 0, a_row, 0)
            low = low | (a_row & 15)
            a = a + (a_row,)
        if low == 0:
            for o_start in range(0, TILE, BLOCK):
                keep = kept(units, state, o_start, block, BLOCK, GROUP, ONCE, D)
                o = o_start + o_block
                acc = tl.zeros((BLOCK,), ACC)
                for t in tl.static_range(T):
                    acc += w[t] * load_full(a[t], o, to_read(keep, GROUP), D, "evict_first").to(ACC)
                if GROUP != DENSE:
                    acc = tl.where(keep, acc, 0.0)
                    n_kept += (keep & (units[0] >= 0)).to(tl.int32)
                store_row(a_out, o, n, acc, True, D, "evict_first")
        else:
            for o_start in range(0, n, BLOCK):
                keep = kept(units, state, o_start, block, BLOCK, GROUP, ONCE, D)
                o = o_start + o_block
                acc = tl.zeros((BLOCK,), ACC)
                for t in tl.static_range(T):
                    acc += w[t] * load_part(a[t], o, n, to_read(keep, GROUP), D, "evict_first").to(ACC)
                if GROUP != DENSE:
                    acc = tl.where(keep, acc, 0.0)
                    n_kept += (keep & (units[0] >= 0) & (o < n)).to(tl.int32)
                store_row(a_out, o, n, acc, False, D, "evict_first")
    if GROUP != DENSE:
        tl.atomic_add(p_count, tl.sum(n_kept, 0).to(tl.int64), sem="relaxed")


@kernel
def surgery_kernel(
    p_items,
    n_items: tl.int32,
    p_segments,
    n_segments: tl.int64,
    n_pieces: tl.int64,
    n_groups: tl.int64,
    p_shared,
    o_flags: tl.int64,
    p_partials,
    p_folded,
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_M,
    n_tasks: tl.int32,
    p_keys,
    s_keys: tl.int64,
    partner: tl.int32,
    p_targets,
    p_moved,
    p_moving,
    beta: tl.float64,
    p_present,
    divisor: tl.int32,
    p_w,
    p_plain,
    p_out,
    s_out: tl.int64,
    p_units,
    p_state,
    block,
    p_count,
    T: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_OUT: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    V: tl.constexpr,
    FOLD: tl.constexpr,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    ONCE: tl.constexpr,
    PRODUCTS_GROUP: tl.constexpr,
):
    """One program: as many pieces of work as it gets to."""
    PAIRS: tl.constexpr = T * (T + 1) // 2
    i_item = draw(p_shared)
    while i_item < n_items:
        p_item = p_items + 4 * i_item.to(tl.int64)
        i_first = tl.load(p_item)
        n_tiles = tl.load(p_item + 1)
        i_segment = tl.load(p_item + 2)
        i_piece = tl.load(p_item + 3)
        if i_piece >= 0:
            acc = sum_products(
                p_tiles,
                i_first,
                n_tiles,
                p_rows,
                s_row,
                p_units,
                p_state,
                block,
                T,
                TABLE,
                D,
                ACC,
                TILE,
                BLOCK,
                V,
                PRODUCTS_GROUP,
                ONCE,
            )
            for i_pair in tl.static_range(PAIRS):
                tl.store(p_partials + i_pair * n_pieces + i_piece, tl.sum(acc[i_pair]))
            finish_piece(
                i_piece,
                i_segment,
                p_segments,
                n_segments,
                n_pieces,
                n_groups,
                p_shared,
                o_flags,
                p_partials,
                p_folded,
                p_M,
                n_tasks,
                p_keys,
                s_keys,
                partner,
                p_targets,
                p_moved,
                beta,
                p_present,
                divisor,
                p_w,
                T,
                FOLD,
                EPS,
            )
        else:
            if i_segment < n_segments:
                wait_for(p_shared + o_flags + i_segment)
            combine_piece(
                i_first,
                n_tiles,
                i_segment,
                n_segments,
                p_tiles,
                p_rows,
                s_row,
                p_w,
                p_plain,
                p_out,
                s_out,
                p_units,
                p_state,
                block,
                p_count,
                T,
                TABLE,
                TABLE_OUT,
                D,
                ACC,
                TILE,
                BLOCK,
                GROUP,
                ONCE,
            )
        # Not before: a program that waits would hold a piece back that others may be waiting for.
        i_item = draw(p_shared)
    if is_last(p_shared + LEFT, tl.num_programs(0)):
        if p_targets is not None:
            if tl.load(p_shared + FOUND, cache_modifier=".cg") == 0:
                move_targets(p_targets, p_moved, p_moving, n_segments, n_tasks)
            tl.debug_barrier()
        clear(p_shared, o_flags + n_segments)


class PCGrad(NamedTuple):
    """The method of ``pcgrad.py``."""

    keys: Tensor | None
    partner: str


class GradVac(NamedTuple):
    """The method of ``gradvac.py``; of a step with any dot product that is not finite no target moves."""

    keys: Tensor
    targets: Tensor
    moving: Tensor
    beta: float


class Work(NamedTuple):
    """The work list and the memory in which the programs keep its state."""

    items: Tensor
    """(n_items, 4) int64, as ``gradkern/ops/one_launch/work_list.py`` says."""
    segments: Tensor
    """(S, 3) int64, the same."""
    n_pieces: int
    n_groups: int
    shared: Tensor
    """int32, :func:`shared_size` zeros at least, which are zero again when the launch is done."""


def flags_at(S: int, n_groups: int) -> int:
    """Where the flags begin in the shared memory of a launch over S segments: on a line of their own."""
    return triton.cdiv(COUNTERS.value + S + n_groups, LINE) * LINE


def shared_size(S: int, n_groups: int) -> int:
    """Numbers of shared memory that a launch takes: ticket, counters, flags."""
    return flags_at(S, n_groups) + S


def surgery(
    rows: Rows,
    tiles: Tensor,
    tile: int,
    mask: Mask | None,
    products_masked: bool,
    work: Work,
    method: PCGrad | GradVac,
    mean: bool,
    present: Tensor | None,
    plain: Tensor | None,
    M: Tensor,
    w: Tensor,
    out: Rows,
    count: Tensor | None,
    programs: int,
) -> Launch:
    """Fill ``M`` (S, T, T), ``w`` (S, T), both in the arithmetic dtype of the rows, and the one row of ``out``.

    Keys, targets and moving are as for the methods' own launches. ``w`` sums up the modified rows of the tasks that are
    ``present`` (T,), with ``mean`` divided by T. Tiles of segment S, outside surgery, are summed by ``plain`` (T,), in
    arithmetic dtype, or by ones. With a mask, ``count``, int64 of one number, grows by how many elements of masked
    tiles are kept; the dot products are dense unless ``products_masked``.

    However many ``programs`` there are, one by one or at once, the bits are the same.
    """
    S, T, _ = M.shape
    dtype = M.dtype
    setting = gramian_setting(rows.dtype.itemsize)
    pairs = T * (T + 1) // 2
    vaccine = method if isinstance(method, GradVac) else None
    arguments = {
        "p_items": work.items,
        "n_items": len(work.items),
        "p_segments": work.segments,
        "n_segments": S,
        "n_pieces": work.n_pieces,
        "n_groups": work.n_groups,
        "p_shared": work.shared,
        "o_flags": flags_at(S, work.n_groups),
        "p_partials": torch.empty(pairs, work.n_pieces, dtype=dtype, device=M.device),
        "p_folded": torch.empty(pairs, work.n_groups, dtype=torch.float64, device=M.device),
        "p_tiles": tiles,
        "p_M": M,
        "n_tasks": T,
        **partner_arguments(method.keys, "all" if isinstance(method, GradVac) else method.partner),
        "p_targets": vaccine and vaccine.targets,
        "p_moved": vaccine and torch.empty_like(vaccine.targets),
        "p_moving": vaccine and vaccine.moving,
        "beta": vaccine.beta if vaccine else 0.0,
        "p_present": present,
        "divisor": T if mean else 1,
        "p_w": w,
        "p_plain": plain,
        "p_out": out.source,
        "s_out": out.stride,
        "p_count": count,
        "T": T,
        "TABLE_OUT": out.table,
        "TILE": tile,
        "BLOCK": setting.BLOCK,
        "V": setting.V,
        "FOLD": FOLD,
        "EPS": torch.finfo(dtype).eps,
        **row_arguments(rows),
        **mask_arguments(mask, rows.dtype),
    }
    arguments["PRODUCTS_GROUP"] = arguments["GROUP"] if products_masked else DENSE.value
    return Launch(surgery_kernel, (programs,), arguments, setting.threads, fp_fusion=False)
