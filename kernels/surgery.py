"""The whole surgery in one launch, for few rows: Gramian, method and combination, as pieces of work to be shared out.

    M[s] = J_s J_s^T,   w[s] = sum_i C(M[s])_i,   out[e] = sum_t w[s, t] J[t, e]      s the segment of e

The programs stay and draw tickets (``work_queue.py``). Each ticket is an item of the work list: run through some tiles
for the Gramian of a segment, or combine them. The last program to finish a piece of a segment's Gramian solves the
segment (``finish_piece.py``) and raises its flag. The combination of the segment (``combine_piece.py``) waits for it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine_piece import KernelWeights, combine_piece
from .finish_piece import KernelProjection, KernelWork, finish_piece, move_targets
from .gramian import sum_products
from .launch import Launch, kernel
from .masks import DENSE, KernelMask, Mask, mask_arguments
from .pcgrad import partner_arguments
from .rows import KernelRows, KernelTiles, Rows, Tiles, row_arguments, tile_arguments
from .settings import FOLD, gramian_setting
from .work_queue import COUNTERS, FOUND, LEFT, LINE, clear, draw_ticket, is_last, wait_for

__all__ = ["FOLD", "Masking", "Projection", "Results", "Work", "flags_at", "shared_size", "surgery"]


@kernel
def surgery_kernel(
    p_items,
    n_items: tl.int32,
    p_segments,
    n_segments: tl.int64,
    n_pieces: tl.int64,
    n_folds: tl.int64,
    p_shared,
    o_flags: tl.int64,
    p_partials,
    p_folded,
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_M,
    n_tasks: tl.int32,
    p_order_keys,
    s_order_keys: tl.int64,
    partner: tl.int32,
    p_targets,
    p_new_targets,
    p_update_mask,
    beta: tl.float64,
    divisor: tl.int32,
    p_w,
    p_out,
    s_out: tl.int64,
    p_units,
    p_state,
    block,
    p_kept,
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
    SHARE: tl.constexpr,
    ONCE: tl.constexpr,
    PRODUCTS_SHARE: tl.constexpr,
):
    """One program: as many items of work as it gets to."""
    PAIRS: tl.constexpr = T * (T + 1) // 2
    i_item = draw_ticket(p_shared)
    while i_item < n_items:
        p_item = p_items + 4 * i_item.to(tl.int64)
        i_first = tl.load(p_item)
        n_tiles = tl.load(p_item + 1)
        i_segment = tl.load(p_item + 2)
        i_piece = tl.load(p_item + 3)
        if i_piece >= 0:
            acc = sum_products(
                KernelRows(p_rows, s_row, TABLE, D, ACC),
                KernelTiles(p_tiles, TILE, BLOCK),
                KernelMask(p_units, p_state, block, PRODUCTS_SHARE, ONCE, D),
                (i_first, n_tiles),
                T,
                V,
            )
            for i_pair in tl.static_range(PAIRS):
                tl.store(p_partials + i_pair * n_pieces + i_piece, tl.sum(acc[i_pair]))
            finish_piece(
                i_piece,
                i_segment,
                KernelWork(p_segments, n_segments, n_pieces, n_folds, p_shared, o_flags, p_partials, p_folded, FOLD),
                p_M,
                KernelProjection(
                    n_tasks, p_order_keys, s_order_keys, partner, p_targets, p_new_targets, beta, divisor, EPS
                ),
                p_w,
                T,
            )
        else:
            if i_segment < n_segments:
                wait_for(p_shared + o_flags + i_segment)
            combine_piece(
                KernelRows(p_rows, s_row, TABLE, D, ACC),
                KernelTiles(p_tiles, TILE, BLOCK),
                KernelMask(p_units, p_state, block, SHARE, ONCE, D),
                (i_first, n_tiles, i_segment),
                KernelWeights(p_w, n_segments, T),
                KernelRows(p_out, s_out, TABLE_OUT, D, ACC),
                p_kept,
            )
        # Not before: a program that waits would hold a piece back that others may be waiting for.
        i_item = draw_ticket(p_shared)
    if is_last(p_shared + LEFT, tl.num_programs(0)):
        if p_targets is not None:
            if tl.load(p_shared + FOUND, cache_modifier=".cg") == 0:
                move_targets(p_targets, p_new_targets, p_update_mask, n_segments, n_tasks)
            tl.debug_barrier()
        clear(p_shared, o_flags + n_segments)


class Masking(NamedTuple):
    """The mask of the combination."""

    mask: Mask | None
    products: bool
    """Whether it applies to the dot products too; else they are dense."""


class Work(NamedTuple):
    """The work list and the memory in which the programs keep its state."""

    items: Tensor
    """(n_items, 4) int64, as ``gradkern/ops/one_launch/work_list.py`` says."""
    segments: Tensor
    """(S, 3) int64, the same."""
    n_pieces: int
    n_folds: int
    shared: Tensor
    """int32, :func:`shared_size` zeros at least, which are zero again when the launch is done."""


class Projection(NamedTuple):
    """The method: PCGrad (``pcgrad.py``) where ``targets`` is None, else GradVac (``gradvac.py``)."""

    order_keys: Tensor | None
    partner: str
    """One of ``pcgrad.PARTNERS``; GradVac visits "all"."""
    targets: Tensor | None
    """They do not move in a step with any dot product that is not finite."""
    update_mask: Tensor | None
    beta: float
    mean: bool
    """Whether weights are divided by T."""


class Results(NamedTuple):
    """Memory for the results."""

    M: Tensor
    """(S, T, T), in the arithmetic dtype of the rows."""
    w: Tensor
    """(S, T), the same: the sum of the modified rows, or their mean."""
    out: Rows
    """One row."""
    kept: Tensor | None
    """With a mask, int64 of one number, which grows by how many elements of masked tiles are kept."""


def flags_at(S: int, n_folds: int) -> int:
    """Return where flags begin in the shared memory of a launch over S segments: on a line of their own."""
    return triton.cdiv(COUNTERS.value + S + n_folds, LINE) * LINE


def shared_size(S: int, n_folds: int) -> int:
    """Return how many numbers of shared memory a launch takes: ticket, counters, flags."""
    return flags_at(S, n_folds) + S


def surgery(
    rows: Rows, tiles: Tiles, masking: Masking, work: Work, method: Projection, results: Results, programs: int
) -> Launch:
    """Fill the ``results``. Tiles of segment S are unshared between tasks: their rows are summed with weight 1.

    Order keys, targets and update mask are as for the methods' own launches. However many ``programs`` there are, one
    by one or at once, the bits are the same.
    """
    M, w, out, kept = results
    S, T, _ = M.shape
    setting = gramian_setting(rows.dtype.itemsize)
    pairs = T * (T + 1) // 2
    arguments = {
        "p_items": work.items,
        "n_items": len(work.items),
        "p_segments": work.segments,
        "n_segments": S,
        "n_pieces": work.n_pieces,
        "n_folds": work.n_folds,
        "p_shared": work.shared,
        "o_flags": flags_at(S, work.n_folds),
        "p_partials": torch.empty(pairs, work.n_pieces, dtype=M.dtype, device=M.device),
        "p_folded": torch.empty(pairs, work.n_folds, dtype=torch.float64, device=M.device),
        "p_M": M,
        "n_tasks": T,
        **partner_arguments(method.order_keys, method.partner),
        "p_targets": method.targets,
        "p_new_targets": None if method.targets is None else torch.empty_like(method.targets),
        "p_update_mask": method.update_mask,
        "beta": method.beta,
        "divisor": T if method.mean else 1,
        "p_w": w,
        "p_out": out.source,
        "s_out": out.stride,
        "p_kept": kept,
        "T": T,
        "TABLE_OUT": out.table,
        "V": setting.V,
        "FOLD": FOLD,
        "EPS": torch.finfo(M.dtype).eps,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(masking.mask, rows.dtype),
    }
    arguments["PRODUCTS_SHARE"] = arguments["SHARE"] if masking.products else DENSE.value
    return Launch(surgery_kernel, (programs,), arguments, setting.threads, fp_fusion=False)
