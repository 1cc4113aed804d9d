"""How each kernel is launched: a written table, no autotune.

The first step of a training run must not be slow, and the ranks of a distributed run must agree to the last bit, so
nothing is searched at run time. The reasons beside the entries are register counts of ahead-of-time builds (sm_90;
``python tests/aot.py`` prints all of them) and arithmetic on them. They are predictions: no entry has been measured
on a GPU yet.
"""

from typing import NamedTuple

import torch

PROGRAMS = 4096
"""Pieces a Gramian is cut into where there are that many tiles: some three waves of an H100 at ten programs on each
of 132 multiprocessors, so that the last wave idles little, and few enough that summing the partials stays cheap."""

LONGEST_PIECE = 64
"""Tiles of a piece at most: bounds the length of a float32 running sum."""

DOT_T = 64
"""Most rows of one Gramian launch; larger Gramians are put together from pairs of half as many."""

OUTPUT_ROWS = 8
"""Most output rows of one program of project: J is read once for up to this many."""

ENTRIES = 128
"""Positions of a program of gather and scatter, one a thread: some thousands of them, times T rows, are a program for
each multiprocessor, and each waits for memory a dozen times in a row, so there is no use in giving it more."""


def register_form(T: int, itemsize: int) -> bool:
    """Whether each pair of rows has an accumulator of its own, instead of ``tl.dot``.

    At T = 12 these take 168 registers in float32 and 230 in float64. 16-bit rows hold twice the elements a thread:
    117 registers at T = 8, while at 12 they spill on sm_100; tensor cores take them as stored, so they go there early.
    """
    return T <= 8 or (T <= 12 and itemsize > 2)


class GramianSetting(NamedTuple):
    """Register form. A thread sums ``V`` products of neighbouring elements before it touches an accumulator."""

    BLOCK: int
    V: int
    threads: int


def gramian_setting(itemsize: int) -> GramianSetting:
    """One 128-bit load a thread and row: V is what 16 bytes hold, BLOCK what 128 threads hold at that.

    40 registers at T = 3 in float32: twelve programs a multiprocessor, 72 KB of loads in flight; at T = 12 three, as
    many bytes. Masks (``masks.py``) of single elements leave these numbers where they are, 38 and 158; of blocks of 128
    they take 52 and 163.
    """
    V = 16 // itemsize
    return GramianSetting(128 * V, V, 128)


ONE_LAUNCH: dict[tuple[int, int], range] = {}
"""By T and the bytes of a number, for rows of how many numbers one launch does the whole surgery (``surgery.py``) on
NVIDIA's GPUs; three launches do it for all others. Empty until the benchmark (``python -m bench --device cuda``, "one
launch" beside "gradkern") has filled it: no user's default is to be what nobody has measured."""

ONE_LAUNCH_T = 4
"""Most rows of the one launch: at T = 4 it takes 72 registers in float32, 80 in 16 bits and 96 in float64, under a
mask up to 128, which leaves four programs a multiprocessor."""

PIECE, SMALL_PIECE = 128 << 10, 24 << 10
"""Bytes of rows of a piece of the one launch, as many whole tiles as they hold, one at least: so many that drawing a
ticket and storing partial sums are little beside them; and for small segments, which else too few programs share."""

SMALL_SEGMENT = 8 << 20
"""Bytes of rows up to which a segment is small: at most as much as lies between its Gramian and its combination."""

LAG = {2: 16 << 20, 4: 8 << 20, 8: 8 << 20}
"""By the bytes of a number, bytes of rows that Gramians read between a segment's Gramian and its combination. A program
takes some 4 µs to solve a segment, in which an H100's memory gives 13 MB: these, and combinations of other segments
between them. With 16-bit rows, of which a piece takes longer than its bytes do, twice as much. The cache holds 50 MB,
of which rows that wait to be read again should take no more than half."""

FOLD = 64
"""Partial sums that one program adds up, once as many pieces of a segment are done; then groups of so many in turn."""

ONE_LAUNCH_PROGRAMS = 8
"""Programs for each multiprocessor, as many as fit at 64 registers (T = 3 in float32; 128 threads): 48 KB of loads in
flight. Where fewer fit, the others start when all work is done, and leave."""


def one_launch(T: int, itemsize: int) -> range:
    """For how many numbers of ``itemsize`` bytes one launch does the surgery of T rows of them.

    Not on AMD's GPUs, where a barrier does not wait for other waves' stores.
    """
    allowed = torch.version.hip is None and T <= ONE_LAUNCH_T
    return ONE_LAUNCH.get((T, itemsize), range(0)) if allowed else range(0)


class DotSetting(NamedTuple):
    """``tl.dot`` form: ROWS x BLOCK operands, sums restarted every CHAIN elements.

    Tensor cores cut sums off instead of rounding them, which is a bias. A model of that (two bits kept beyond those of
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
    # float32: up to 32 rows multiplied as they are; for 64, two tf32 products, 8 columns a step, 16 steps a chain.
    4: (
        DotSetting(16, 64, 512, 32),  # one warp: 154 registers, 12 programs
        DotSetting(32, 32, 512, 128),  # 102 registers; 64 columns spill in the loop on sm_80
        DotSetting(64, 32, 128, 128),  # 196 registers; 64 columns need all 255
    ),
    # float64: half the columns or twice the threads, for a number takes two registers.
    8: (
        DotSetting(16, 32, 512, 64),  # 128 registers
        DotSetting(32, 32, 512, 128),  # 168 registers
        DotSetting(64, 32, 512, 256),  # 247 registers; 128 threads spill
    ),
}


def dot_setting(T: int, itemsize: int) -> DotSetting:
    """The smallest that holds T rows."""
    return next(setting for setting in DOT_SETTINGS[itemsize] if T <= setting.ROWS)


class TileSetting(NamedTuple):
    """Combine and project: elements a program holds at a time."""

    BLOCK: int
    threads: int


def combine_setting() -> TileSetting:
    """A whole tile in one go, 16 elements a thread: four rows in flight are 64 KB of float32 a program.

    122 registers (80 on a matrix), and 104 to 128 under a mask of single elements or of blocks of whole 128-bit loads:
    two programs a multiprocessor. One of what takes more: float64, 192 to 204, and blocks that leave less of a load in
    one piece, as in float32 those of two (154) or of any odd number, which load single elements (149).
    """
    return TileSetting(4096, 256)


def adamw_setting(itemsize: int) -> TileSetting:
    """Eight elements a thread, four in float64: besides four rows in flight there are three or four of state.

    96 registers in float32 and 16 bits, 127 under a mask of blocks of 128; float64 96, with amsgrad 124.
    """
    return TileSetting(512 if itemsize == 8 else 1024, 128)


def project_setting(itemsize: int) -> TileSetting:
    """Eight float32 accumulators a thread and output row, half in float64, where a number takes two registers."""
    return TileSetting(512 if itemsize == 8 else 1024, 128)
