"""The mask of gradient suppression: a function of seed, step and unit number, the same wherever it is asked.

Neighbouring elements of a tensor, ``block`` at a time, are a unit; unit u is dropped if

    word u mod 4 of Philox4x32-10(key = seed, counter = (u div 4, step), each of 64 bits) < threshold

(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Nothing of the mask is stored. A kernel is compiled
for two properties of the mask, ``SHARE`` and ``ONCE``. They decide how many words a thread draws, and whether a load
can be left out. ``SHARE`` is one of:

- ``DENSE``: no mask at all.
- ``EACH``, units of one element: four neighbours take the four words of one Philox where they are, no thread asks
  another. Memory is read in sectors of 32 bytes, in which almost never all elements are dropped. So loads stay whole,
  and dropped elements are set to zero afterwards.
- else the number of neighbours of one 128-bit load that surely share a unit, the largest power of two that divides
  ``block``: one Philox for them, and the load is left out where they are dropped.

``ONCE``: so few units of 128 elements or more lie in a tile that the draws of all fit in the bits of one number. It is
drawn when the tile is begun. A load looks up a bit of it and needs no Philox of its own.

Seed, step and threshold lie in device memory, and ``block`` is a run-time number, so none compiles a kernel anew.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DENSE = tl.constexpr(0)
EACH = tl.constexpr(-1)

FEWEST_ONCE = 128
"""Elements of the smallest unit that is drawn once for a tile, which then holds no more than 64 of them."""

LARGEST_BLOCK = 1 << 30
"""Positions within a unit and a tile are counted in 32 bits."""


class Mask(NamedTuple):
    """The mask over the tiles of a layout."""

    units: Tensor
    """(n_tiles, 2) int64: the unit a tile starts in, -1 if nothing of it is masked; how far into that unit."""
    block: int
    """Elements of a unit, from 1 to ``LARGEST_BLOCK``."""
    state: Tensor
    """(3,) int64: seed and step, by their bits, and the threshold, from 0 to 2**32."""


class KernelMask(NamedTuple):
    """The bundle of ``Mask`` inside a kernel, with the dtype D of the rows that it masks."""

    p_units: Any
    p_state: Any
    block: Any
    SHARE: tl.constexpr
    ONCE: tl.constexpr
    D: tl.constexpr


def mask_arguments(mask: Mask | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that describe the mask over rows of ``dtype``."""
    if mask is None:
        return {"p_units": None, "p_state": None, "block": None, "SHARE": DENSE.value, "ONCE": False}
    vector = 16 // dtype.itemsize
    share = EACH.value if mask.block == 1 else math.gcd(mask.block, vector)
    once = mask.block >= FEWEST_ONCE
    return {"p_units": mask.units, "p_state": mask.state, "block": mask.block, "SHARE": share, "ONCE": once}


@triton.jit
def load_state(mask):
    """(seed, step, threshold); nothing without a mask."""
    if mask.SHARE == DENSE:
        return ()
    else:
        return tl.load(mask.p_state), tl.load(mask.p_state + 1), tl.load(mask.p_state + 2)


@triton.jit
def load_units(mask, state, i_tile):
    """(unit that a tile starts in, elements of that unit before it, draws of its units); nothing without a mask."""
    if mask.SHARE == DENSE:
        return ()
    else:
        first_unit = tl.load(mask.p_units + 2 * i_tile)
        before = tl.load(mask.p_units + 2 * i_tile + 1).to(tl.uint32)
        return first_unit, before, drawn_once(first_unit, state, mask.ONCE)


@triton.jit
def drawn_once(first_unit, state, ONCE: tl.constexpr):
    """An int64 whose bit i says whether unit i from the first on is kept."""
    if ONCE:
        i_unit = tl.arange(0, 64)
        keep = draw_units(first_unit + i_unit, state)
        return tl.sum(keep.to(tl.int64) << i_unit.to(tl.int64), 0)
    else:
        return 0


@triton.jit
def draw_words(counter, seed, step):
    """The four words of Philox at ``counter``."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    c2 = zero + step.to(tl.uint32)
    c3 = zero + (step >> 32).to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def draw(counter, state):
    """For each of the four words of Philox at ``counter``, whether it keeps its unit."""
    seed, step, threshold = state
    w0, w1, w2, w3 = draw_words(counter, seed, step)
    # A threshold of 2**32, which drops everything, is one more than a word can hold.
    low = threshold.to(tl.uint32)
    m_some = (threshold >> 32) == 0
    return (w0 >= low) & m_some, (w1 >= low) & m_some, (w2 >= low) & m_some, (w3 >= low) & m_some


@triton.jit
def draw_units(unit, state):
    """Whether each unit is kept: one Philox for each, of which it takes one word."""
    k0, k1, k2, k3 = draw(unit >> 2, state)
    word = (unit & 3).to(tl.int32)
    return tl.where(word < 2, tl.where(word == 0, k0, k1), tl.where(word == 2, k2, k3))


@triton.jit
def kept_elements(mask, state, units, o_start, BLOCK: tl.constexpr):
    """Whether each of the BLOCK elements from ``o_start`` of a tile is kept; True without a mask."""
    if mask.SHARE == DENSE:
        return True
    elif mask.SHARE == EACH:
        return kept_each(mask, state, units, o_start, BLOCK)
    else:
        return kept_together(mask, state, units, o_start, BLOCK)


@triton.jit
def to_read(mask, keep):
    """The predicate of wide loads: ``keep`` where it holds whole vectors, else True."""
    if mask.SHARE > 0:
        return keep
    else:
        return True


@triton.jit
def zero_dropped(mask, keep, x):
    """``x`` as loaded under :func:`to_read`, zero where it was read and is not kept."""
    if mask.SHARE == EACH:
        return tl.where(keep, x, 0.0)
    else:
        return x


@triton.jit
def kept_each(mask, state, units, o_start, BLOCK: tl.constexpr):
    """Every element is a unit: a thread draws for the elements of its own 128-bit loads, one Philox or two."""
    first_unit, _, _ = units
    DRAWS: tl.constexpr = 2 if mask.D.primitive_bitwidth == 16 else 1
    counter = ((first_unit + o_start) >> 2) + DRAWS * tl.arange(0, BLOCK // (4 * DRAWS))
    k0, k1, k2, k3 = draw(counter, state)
    if DRAWS == 2:
        l0, l1, l2, l3 = draw(counter + 1, state)
        k0, k1, k2, k3 = tl.join(k0, l0), tl.join(k1, l1), tl.join(k2, l2), tl.join(k3, l3)
    # The last join varies fastest: words 0, 1, 2, 3 in turn.
    keep = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK,))
    return keep | (first_unit < 0)


@triton.jit
def kept_together(mask, state, units, o_start, BLOCK: tl.constexpr):
    """SHARE neighbours are in one unit: one look-up, or one Philox, for them."""
    first_unit, before, bits = units
    SHARE: tl.constexpr = mask.SHARE
    o = (o_start + SHARE * tl.arange(0, BLOCK // SHARE)).to(tl.uint32)
    i_unit = ((before + o) // mask.block.to(tl.uint32)).to(tl.int64)
    keep = ((bits >> i_unit) & 1) != 0 if mask.ONCE else draw_units(first_unit + i_unit, state)
    # By joins, all that share a unit stay in one thread.
    if SHARE >= 2:
        keep = tl.join(keep, keep)
    if SHARE >= 4:
        keep = tl.join(keep, keep)
    if SHARE >= 8:
        keep = tl.join(keep, keep)
    # The hint keeps the load of such neighbours in one piece. It stands on the result of an operation, because the
    # compiler may rebuild a reshape in another layout and without the hint.
    return tl.max_constancy(tl.reshape(keep, (BLOCK,)) | (first_unit < 0), [SHARE])
