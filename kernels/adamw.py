"""AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") on a gradient that is never in memory.

    g = sum_t w[s, t] J[t]                          s the segment; 0 where a mask drops
    p = (1 - lr weight_decay) p
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2                   u = v, or with amsgrad the largest v so far
    p = p - lr / (1 - beta1^k) m / (sqrt(u) / sqrt(1 - beta2^k) + eps)         k the step, 1 for the first

A program owns a block of a tile. Parameters are stored in a dtype of their own; moments in the arithmetic dtype, in
which all of this is computed. Powers of the betas are float64, because 1 - beta^k would lose digits otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .combine import weighted_sum, zero_and_count
from .launch import Launch, kernel
from .masks import DENSE, KernelMask, Mask, kept_elements, load_state, load_units, mask_arguments, to_read
from .rows import (
    TRITON_DTYPE,
    KernelRows,
    KernelTiles,
    Rows,
    Tiles,
    load_full,
    load_part,
    load_tile,
    n_blocks,
    program_block,
    row_address,
    row_arguments,
    store_row,
    tile_arguments,
)
from .served import setting_for


class AdamWState(NamedTuple):
    """The tensors that a step changes, and their steps."""

    params: Rows
    """One row."""
    moments: Rows
    """Two rows, m and v; a third, the largest v, is amsgrad."""
    steps: Tensor
    """(n,) int64: the address of each tensor's step, a float32 that counts this one."""


class AdamWStep(NamedTuple):
    """The numbers of a step."""

    found_inf: Tensor | None
    """(), float32; where it is not 0 nothing changes."""
    lr_scale: Tensor | None
    """(), by which lr is multiplied."""
    hyperparameters: Sequence[float]
    """lr, beta1, beta2, weight_decay and eps."""


class KernelState(NamedTuple):
    """The bundle of ``AdamWState`` inside the kernel."""

    params: KernelRows
    moments: KernelRows
    p_steps: Any
    AMSGRAD: tl.constexpr


class KernelStep(NamedTuple):
    """The bundle of ``AdamWStep`` inside the kernel, with the binary logarithms of the betas."""

    p_lr_scale: Any
    lr: Any
    beta1: Any
    beta2: Any
    log2_beta1: Any
    log2_beta2: Any
    weight_decay: Any
    eps: Any


@triton.jit
def load_row(a, o, n, m_full, D: tl.constexpr):
    """Elements ``o`` below ``n`` from address ``a``; ``m_full`` picks the road."""
    if m_full:  # noqa: SIM108 (a branch, where the shorter form would load by both roads)
        x = load_full(a, o, True, D)
    else:
        x = load_part(a, o, n, True, D)
    return x


@triton.jit
def corrections(k, lr, step, ACC: tl.constexpr):
    """(lr / (1 - beta1^k), sqrt(1 - beta2^k)) of step ``k``."""
    # beta^k = 2^(k log2 beta)
    correction1 = (1 - tl.exp2(k * step.log2_beta1)).to(ACC)
    correction2 = (1 - tl.exp2(k * step.log2_beta2)).to(ACC)
    return lr.to(ACC) / correction1, tl.sqrt(correction2)


@triton.jit
def step_block(rows, tiles, mask, weights, state, step, p_kept):
    """Step the program's block; ``weights`` is a pointer, and T."""
    p_w, T = weights
    ACC: tl.constexpr = rows.ACC
    PARAM: tl.constexpr = state.params.D
    i_tile, o_start = program_block(tiles)
    tile = load_tile(tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    if o_start >= n:
        return
    mask_state = load_state(mask)
    units = load_units(mask, mask_state, i_tile)
    a_p = row_address(state.params, 0, i_tensor, o_first, True)
    a_m = row_address(state.moments, 0, i_tensor, o_first, True)
    a_v = row_address(state.moments, 1, i_tensor, o_first, True)
    misfit = (n ^ tiles.TILE) | (a_p & 15) | (a_m & 15) | (a_v & 15)
    a_u = a_v
    if state.AMSGRAD:
        a_u = row_address(state.moments, 2, i_tensor, o_first, True)
        misfit = misfit | (a_u & 15)
    m_full = misfit == 0
    # The step count takes two loads, one after the other. It is used when all others are on their way.
    k = tl.load(tl.load(state.p_steps + i_tensor).to(tl.pointer_type(tl.float32))).to(tl.float64)
    lr = tl.full((), step.lr, tl.float64)
    if step.p_lr_scale is not None:
        lr = lr * tl.load(step.p_lr_scale).to(tl.float64)

    o = o_start + tl.arange(0, tiles.BLOCK)
    m_read = to_read(mask, kept_elements(mask, mask_state, units, o_start, tiles.BLOCK))
    p = load_row(a_p, o, n, m_full, PARAM).to(ACC)
    m = load_row(a_m, o, n, m_full, ACC)
    v = load_row(a_v, o, n, m_full, ACC)
    u = v
    if state.AMSGRAD:
        u = load_row(a_u, o, n, m_full, ACC)
    g = weighted_sum(rows, p_w, T, tile, o, m_read, tiles.TILE)
    if mask.SHARE != DENSE:
        g = zero_and_count(g, mask, mask_state, units, o_start, n, p_kept)

    lr_of_m, root = corrections(k, lr, step, ACC)
    shrink = (1 - lr * step.weight_decay).to(ACC)
    old1, new1 = tl.full((), step.beta1, ACC), tl.full((), 1 - step.beta1, ACC)
    old2, new2 = tl.full((), step.beta2, ACC), tl.full((), 1 - step.beta2, ACC)
    m = old1 * m + new1 * g
    v = old2 * v + new2 * g * g
    if state.AMSGRAD:
        u = tl.maximum(u, v, propagate_nan=tl.PropagateNan.ALL)
        store_row(a_u, o, n, u, m_full, ACC)
    else:
        u = v
    p = shrink * p - lr_of_m * m / (tl.sqrt(u) / root + tl.full((), step.eps, ACC))
    store_row(a_p, o, n, p, m_full, PARAM)
    store_row(a_m, o, n, m, m_full, ACC)
    store_row(a_v, o, n, v, m_full, ACC)


@kernel
def adamw_kernel(
    p_tiles,
    p_rows,
    s_row: tl.int64,
    p_w,
    T: tl.int64,
    p_params,
    p_moments,
    p_steps,
    s_tensor: tl.int64,
    p_found_inf,
    p_lr_scale,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    p_units,
    p_state,
    block,
    p_kept,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PARAM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one block."""
    if p_found_inf is not None:  # noqa: SIM102 (decided when compiled: there may be nothing to load)
        if tl.load(p_found_inf) != 0:
            return
    step_block(
        KernelRows(p_rows, s_row, TABLE, D, ACC),
        KernelTiles(p_tiles, TILE, BLOCK),
        KernelMask(p_units, p_state, block, SHARE, ONCE, D),
        (p_w, T),
        KernelState(
            KernelRows(p_params, s_tensor, True, PARAM, ACC),
            KernelRows(p_moments, s_tensor, True, ACC, ACC),
            p_steps,
            AMSGRAD,
        ),
        KernelStep(p_lr_scale, lr, beta1, beta2, log2_beta1, log2_beta2, weight_decay, eps),
        p_kept,
    )


def log2(beta: float) -> float:
    """Return the binary logarithm; -inf of 0."""
    return math.log2(beta) if beta > 0 else -math.inf


def adamw(
    rows: Rows,
    tiles: Tiles,
    mask: Mask | None,
    w: Tensor,
    kept: Tensor | None,
    state: AdamWState,
    step: AdamWStep,
) -> Launch:
    """Step ``state`` along Σ_t w[s, t] of the rows; ``w`` (S, T) and ``kept`` are as for ``combine``."""
    setting = setting_for("adamw", rows)
    lr, beta1, beta2, weight_decay, eps = map(float, step.hyperparameters)
    arguments = {
        "p_w": w,
        "T": rows.count,
        "p_params": state.params.source,
        "p_moments": state.moments.source,
        "p_steps": state.steps,
        "s_tensor": state.params.stride,
        "p_found_inf": step.found_inf,
        "p_lr_scale": step.lr_scale,
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "log2_beta1": log2(beta1),
        "log2_beta2": log2(beta2),
        "weight_decay": weight_decay,
        "eps": eps,
        "p_kept": kept,
        "PARAM": TRITON_DTYPE[state.params.dtype],
        "AMSGRAD": state.moments.count == 3,
        **row_arguments(rows),
        **tile_arguments(tiles, setting.BLOCK),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(adamw_kernel, (n_blocks(tiles, setting.BLOCK),), arguments, setting.threads, fp_fusion=True)
