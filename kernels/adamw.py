"""AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") on a gradient that is never in memory.

    g = sum_t w[s, t] J[t]                          s the segment; 0 where a mask drops
    p = (1 - lr weight_decay) p
    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2                   u = v, or with amsgrad the largest v so far
    p = p - lr / (1 - beta1^k) m / (sqrt(u) / sqrt(1 - beta2^k) + eps)         k the step, 1 for the first

A program owns a tile and takes a block of it at a time. Parameters are stored in a dtype of their own; moments in the
arithmetic dtype, in which all of this is computed.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .combine import weighted_sum, zero_and_count
from .launch import Launch, kernel
from .masks import DENSE, Mask, kept, load_state, load_units, mask_arguments, to_read
from .rows import TRITON_DTYPE, Rows, load_full, load_part, load_tile, row_address, row_arguments, store_row
from .settings import adamw_setting


@triton.jit
def load_row(a, o, n, m_full, D: tl.constexpr):
    """Elements ``o`` below ``n`` from address ``a``; ``m_full`` picks the road."""
    if m_full:  # noqa: SIM108 (a branch, where the shorter form would load by both roads)
        x = load_full(a, o, True, D)
    else:
        x = load_part(a, o, n, True, D)
    return x


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
    weight_decay: tl.float64,
    eps: tl.float64,
    p_units,
    p_state,
    block,
    p_count,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PARAM: tl.constexpr,
    AMSGRAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One program: one tile."""
    if p_found_inf is not None:  # noqa: SIM102 (decided when compiled: there may be nothing to load)
        if tl.load(p_found_inf) != 0:
            return
    i_tile = tl.program_id(0).to(tl.int64)
    tile = load_tile(p_tiles, i_tile)
    i_tensor, o_first, n, _i_segment = tile
    state = load_state(p_state, GROUP)
    units = load_units(p_units, i_tile, state, GROUP, ONCE)

    k = tl.load(tl.load(p_steps + i_tensor).to(tl.pointer_type(tl.float32))).to(tl.float64)
    lr = tl.full((), lr, tl.float64)
    if p_lr_scale is not None:
        lr = lr * tl.load(p_lr_scale).to(tl.float64)
    # beta^k = 2^(k log2 beta)
    lr_of_m = (lr / (1 - tl.exp2(k * tl.log2(tl.full((), beta1, tl.float64))))).to(ACC)
    root = tl.sqrt(1 - tl.exp2(k * tl.log2(tl.full((), beta2, tl.float64)))).to(ACC)
    shrink = (1 - lr * weight_decay).to(ACC)
    old1, new1 = tl.full((), beta1, ACC), tl.full((), 1 - beta1, ACC)
    old2, new2 = tl.full((), beta2, ACC), tl.full((), 1 - beta2, ACC)
    epsilon = tl.full((), eps, ACC)

    a_p = row_address(p_params, s_tensor, 0, i_tensor, o_first, True, True, PARAM)
    a_m = row_address(p_moments, s_tensor, 0, i_tensor, o_first, True, True, ACC)
    a_v = row_address(p_moments, s_tensor, 1, i_tensor, o_first, True, True, ACC)
    low = (n ^ TILE) | (a_p & 15) | (a_m & 15) | (a_v & 15)
    a_u = a_v
    if AMSGRAD:
        a_u = row_address(p_moments, s_tensor, 2, i_tensor, o_first, True, True, ACC)
        low = low | (a_u & 15)
    m_full = low == 0

    for o_start in range(0, n, BLOCK):
        o = o_start + tl.arange(0, BLOCK)
        m_read = to_read(kept(units, state, o_start, block, BLOCK, GROUP, ONCE, D), GROUP)
        p = load_row(a_p, o, n, m_full, PARAM).to(ACC)
        m = load_row(a_m, o, n, m_full, ACC)
        v = load_row(a_v, o, n, m_full, ACC)
        g = weighted_sum(p_rows, s_row, p_w, T, tile, o, m_read, TABLE, D, ACC, TILE)
        if GROUP != DENSE:
            g = zero_and_count(g, units, state, o_start, n, block, p_count, GROUP, ONCE, D)
        m = old1 * m + new1 * g
        v = old2 * v + new2 * g * g
        u = v
        if AMSGRAD:
            u = tl.maximum(load_row(a_u, o, n, m_full, ACC), v, propagate_nan=tl.PropagateNan.ALL)
            store_row(a_u, o, n, u, m_full, ACC)
        p = shrink * p - lr_of_m * m / (tl.sqrt(u) / root + epsilon)
        store_row(a_p, o, n, p, m_full, PARAM)
        store_row(a_m, o, n, m, m_full, ACC)
        store_row(a_v, o, n, v, m_full, ACC)


def adamw(
    rows: Rows,
    tiles: Tensor,
    tile: int,
    mask: Mask | None,
    w: Tensor,
    params: Rows,
    moments: Rows,
    steps: Tensor,
    found_inf: Tensor | None,
    lr_scale: Tensor | None,
    hyperparameters: Sequence[float],
    count: Tensor | None,
) -> Launch:
    """Step the one row of ``params`` and their ``moments`` along Σ_t w[s, t] of the rows, w (S, T) as for ``combine``.

    Args:
        moments: two rows, m and v; a third, the largest v, is amsgrad.
        steps: (n,) int64, where the step of each tensor lies, float32, this one counted.
        found_inf: (), float32; where it is not 0 nothing changes.
        lr_scale: (), by which lr is multiplied.
        hyperparameters: lr, beta1, beta2, weight_decay and eps.
        count: as for ``combine``.
    """
    setting = adamw_setting(rows.dtype.itemsize)
    arguments = {
        "p_tiles": tiles,
        "p_w": w,
        "T": rows.count,
        "p_params": params.source,
        "p_moments": moments.source,
        "p_steps": steps,
        "s_tensor": params.stride,
        "p_found_inf": found_inf,
        "p_lr_scale": lr_scale,
        **dict(zip(("lr", "beta1", "beta2", "weight_decay", "eps"), map(float, hyperparameters), strict=True)),
        "p_count": count,
        "PARAM": TRITON_DTYPE[params.dtype],
        "AMSGRAD": moments.count == 3,
        "TILE": tile,
        "BLOCK": setting.BLOCK,
        **row_arguments(rows),
        **mask_arguments(mask, rows.dtype),
    }
    return Launch(adamw_kernel, (len(tiles),), arguments, setting.threads, fp_fusion=True)
