"""The launch settings of each kernel, as written: they serve every device without a measured table (``served.py``).

The first step of a training run must not be slow, and the ranks of a distributed run must agree to the last bit, so
nothing is searched at run time. The reasons beside the entries are register counts of ahead-of-time builds (sm_90;
``python tests/aot.py`` prints all of them) and arithmetic on them. They are predictions: no entry has been measured
on a GPU yet.

A block (``BLOCK``) is what a program takes in one step of its loop over the elements of a tile.
"""

from typing import NamedTuple

import torch

PROGRAMS = 4096
"""Pieces that a Gramian is cut into, if it has that many tiles: some three waves of an H100 at ten programs on each of
132 multiprocessors, so that the last wave idles little, and few enough that summing the partials stays cheap."""

LONGEST_PIECE = 64
"""Most tiles of a piece: it bounds the length of a float32 running sum."""


class PieceSetting(NamedTuple):
    """Setting of the pieces that a Gramian is cut into; see ``PROGRAMS`` and ``LONGEST_PIECE``."""

    PROGRAMS: int
    LONGEST: int


DOT_T = 64
"""Most rows of one Gramian launch; larger Gramians are put together from pairs of half as many."""

OUTPUT_ROWS = 8
"""Most output rows of one program of project: J is read once for up to this many."""

ENTRIES = 128
"""Positions of a program of gather and scatter, one a thread. Some thousands of them, times T rows, are a program for
each multiprocessor. Each program waits for memory a dozen times in a row, so there is no use in giving it more."""


def register_form(T: int, itemsize: int) -> bool:
    """Whether each pair of rows has an accumulator of its own, instead of ``tl.dot``.

    At T = 12 the accumulators take 168 registers in float32 and 230 in float64. 16-bit rows hold twice the elements a
    thread: 117 registers at T = 8, while at 12 they spill on sm_100. Tensor cores take 16-bit rows as stored, so these
    rows go there early.
    """
    return T <= 8 or (T <= 12 and itemsize > 2)


class GramianSetting(NamedTuple):
    """Setting of the register form. A thread sums ``V`` products of neighbours before it touches an accumulator."""

    BLOCK: int
    V: int
    threads: int


def gramian_setting(itemsize: int) -> GramianSetting:
    """One 128-bit load a thread and row: V is the number of elements in 16 bytes, BLOCK is V for each of 128 threads.

    It takes 40 registers at T = 3 in float32: twelve programs a multiprocessor, 72 KB of loads in flight; at T = 12
    three programs, with as many bytes. Masks (``masks.py``) of single elements leave these numbers where they are, 38
    and 158; masks of 128 elements a unit take 52 and 163.
    """
    V = 16 // itemsize
    return GramianSetting(128 * V, V, 128)


ONE_LAUNCH: dict[tuple[int, int], range] = {}
"""The lengths of rows for which one launch does the whole surgery (``surgery.py``) on NVIDIA's GPUs, by T and the bytes
of a number. Three launches do it for all others. The table is empty until the benchmark (``python -m bench --device
cuda``, "one launch" beside "gradkern") has filled it: nothing becomes a default before it is measured."""

ONE_LAUNCH_T = 4
"""Most rows of the one launch: at T = 4 it takes 72 registers in float32, 80 in 16 bits and 96 in float64, under a
mask up to 128, which leaves four programs a multiprocessor."""

PIECE, SMALL_PIECE = 128 << 10, 24 << 10
"""Bytes of rows of a piece of the one launch, and the same for small segments. A piece is as many whole tiles as the
bytes hold, one at least. ``PIECE`` is so large that drawing a ticket and storing partial sums are little beside it. Too
few programs would share a small segment in pieces of that size."""

SMALL_SEGMENT = 8 << 20
"""Bytes of rows up to which a segment is small: no more than the bytes between its Gramian and its combination."""

LAG = {2: 16 << 20, 4: 8 << 20, 8: 8 << 20}
"""Bytes of rows that other Gramians read between a segment's Gramian and its combination, by the bytes of a number. A
program takes some 4 µs to solve a segment, in which an H100's memory gives 13 MB: these, and combinations of other
segments between them. With 16-bit rows it is twice as much, since a piece of them takes longer than its bytes do. The
cache holds 50 MB. Rows that wait to be read again should take no more than half of it."""

FOLD = 64
"""Pieces of a fold: neighbours in a segment, whose partial sums one program adds up. Another adds up those of all
folds, as many at a time."""

ONE_LAUNCH_PROGRAMS = 8
"""Programs for each multiprocessor, as many as fit at 64 registers (T = 3 in float32; 128 threads): 48 KB of loads in
flight. If fewer fit, the others start when all work is done, and leave."""


def one_launch_works(T: int) -> bool:
    """Return whether the one launch can take T rows.

    It takes none on AMD's GPUs, where a barrier does not wait for other waves' stores.
    """
    return torch.version.hip is None and T <= ONE_LAUNCH_T


class Sizes(NamedTuple):
    """Lengths of rows for which one launch does the surgery: from ``start`` on, below ``stop``."""

    start: int
    stop: int


class DotSetting(NamedTuple):
    """Setting of the ``tl.dot`` form: ROWS x BLOCK operands, sums restarted every CHAIN elements.

    Tensor cores cut sums off instead of rounding them, which is a bias. A model of it (two bits kept beyond those of
    float32) comes to 4 to 5 millionths of a square at 64 steps a chain, and to one at 16.
    """

    ROWS: int
    BLOCK: int
    CHAIN: int
    threads: int


DOT_SETTINGS = {
    # 16-bit: operands are small, so 64 columns; a tensor core step takes 16 of them, a chain is 16 steps.
    2: (
        DotSetting(16, 64, 256, 32),  # one warp: 108 registers, 16 programs a multiprocessor
        DotSetting(32, 64, 256, 128),  # 80 registers
        DotSetting(64, 64, 256, 128),  # 134 registers
    ),
    # float32: on NVIDIA two tf32 products, 8 columns a step, 16 steps a chain. As fused multiply-adds 16 rows would
    # take 712 instructions for each 4 KB of rows, not 315, and 32 rows would take longer than memory does.
    4: (
        DotSetting(16, 64, 128, 32),  # one warp: 230 registers, 8 programs
        DotSetting(32, 32, 128, 64),  # 167 registers, 6 programs; 128 threads take twice the instructions
        DotSetting(64, 32, 128, 128),  # 196 registers; 64 columns need all 255
    ),
    # float64: half the columns or twice the threads, because a number takes two registers.
    8: (
        DotSetting(16, 32, 512, 64),  # 128 registers
        DotSetting(32, 32, 512, 128),  # 168 registers
        DotSetting(64, 32, 512, 256),  # 247 registers; 128 threads spill
    ),
}


def dot_setting(T: int, itemsize: int) -> DotSetting:
    """Return the smallest setting that holds T rows."""
    return next(setting for setting in DOT_SETTINGS[itemsize] if T <= setting.ROWS)


class TileSetting(NamedTuple):
    """Setting of combine, AdamW and project: the elements that a program holds at a time."""

    BLOCK: int
    threads: int


def combine_setting() -> TileSetting:
    """Eight elements a thread: four rows in flight are 16 KB of float32 a program.

    A program waits for memory three times in a row: for its tile, for addresses, for rows. Small programs hide that:
    it takes 52 registers in float32, and 60 to 72 under a mask, so seven to nine fit on a multiprocessor, with 112 to
    144 KB in flight. float64 takes 94 to 120. Twice the elements a thread take 88, and half the bytes are in flight.
    """
    return TileSetting(1024, 128)


def adamw_setting(itemsize: int) -> TileSetting:
    """Eight elements a thread, four in float64: besides four rows in flight there are three or four of state.

    It takes 80 registers in float32, 72 in 16 bits, with amsgrad 96, under a mask up to 112; float64 up to 96.
    """
    return TileSetting(512 if itemsize == 8 else 1024, 128)


def graddrop_setting(itemsize: int) -> TileSetting:
    """Eight elements a thread, four in float64: two sums, with coefficients two more, and four rows in flight.

    It takes 64 registers on sm_90, 143 with coefficients and under a mask.
    """
    return TileSetting(512 if itemsize == 8 else 1024, 128)


def trimmed_mean_setting(k: int, itemsize: int) -> TileSetting:
    """Return as many elements a thread as let the 2 k entries that may be trimmed, and some sums, stay in registers.

    That is eight for k = 1 in float32, half of it in float64, and less the larger k is, down to one. It takes 80
    registers on sm_90 for k = 1, 106 for k = 4; with weights and under a mask up to 193.
    """
    elements = (2 if itemsize == 8 else 4) if k > 1 else (4 if itemsize == 8 else 8)
    while elements > 1 and elements * (2 * k + 2) * max(1, itemsize // 4) > 64:
        elements //= 2
    return TileSetting(128 * elements, 128)


def project_setting(itemsize: int) -> TileSetting:
    """Eight float32 accumulators a thread and output row, half in float64, where a number takes two registers."""
    return TileSetting(512 if itemsize == 8 else 1024, 128)


SOLVER_T = 64
"""Most tasks of a problem that one program solves. The matrix lies in registers, up to sixteen numbers a thread."""


def solver_threads(T: int) -> int:
    """Return the threads of a program that solves a T x T problem: one warp up to 16, four up to 32, then eight.

    A warp exchanges numbers without shared memory and never waits for another one. On sm_90 the largest problems take
    220 to 243 registers. Fair weights beyond T = 32 take all 255 and spill, outside of elimination's loops: a logarithm
    and a power of every number.
    """
    return 32 if T <= 16 else 128 if T <= 32 else 256
