"""The settings that a table may choose from, for each kernel, with the default among them.

The lists are short, since each setting is compiled, checked and measured. A table names settings of these lists and
nothing else, so no file can make a kernel that has not been written down here.
"""

from collections.abc import Iterator
from itertools import combinations

import torch

from gradkern.kernels.served import Key, served
from gradkern.kernels.settings import (
    DotSetting,
    GramianSetting,
    PieceSetting,
    Sizes,
    TileSetting,
    dot_setting,
    gramian_setting,
    one_launch_works,
)
from gradkern.ops.devices import CPU, GPU
from gradkern.ops.layout import TILE
from gradkern.ops.pytorch.chunks import LONGEST, SCRATCH, ChunkSetting
from gradkern.ops.pytorch.combination import COLUMNS, ColumnSetting

Setting = GramianSetting | DotSetting | PieceSetting | TileSetting | Sizes | ChunkSetting | ColumnSetting

KERNELS = {
    CPU.type: ("chunks", "columns"),
    GPU: ("gramian", "combine", "adamw", "project", "pieces", "one_launch"),
}
"""What a table of each kind of card has settings for."""
DTYPES = {
    CPU.type: {4: torch.float32, 8: torch.float64},
    GPU: {4: torch.float32, 2: torch.bfloat16},
}
"""The dtype that is measured, by the bytes of a number. On a GPU, rows of float64 keep the default settings."""
FIRST = (3, 2, 4)
"""The numbers of tasks that are measured first, since time may end before all are."""

ONE_LAUNCH_SIZES = (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
"""The lengths of rows at which one launch is compared with three."""


def keys(kind: str) -> list[Key]:
    """Return the keys of a kind of card in the order in which they are measured."""
    found = [
        Key(kernel, rows, itemsize)
        for kernel in KERNELS[kind]
        for rows in served.tunable[kernel].rows
        for itemsize in DTYPES[kind]
        if kernel != "one_launch" or one_launch_works(rows)
    ]
    return sorted(found, key=lambda key: (key.rows not in FIRST, FIRST.index(key.rows) if key.rows in FIRST else 0))


def candidates(key: Key) -> list[Setting]:
    """Return the settings of a kernel, the default first."""
    default = served.tunable[key.kernel].default(key.rows, key.itemsize)
    others = [setting for setting in _LISTS[key.kernel](key) if setting != default]
    return others if default is None else [default, *others]


def _gramian(key: Key) -> Iterator[Setting]:
    """Yield both forms where both can be, with half, once and twice the threads, or two blocks a program."""
    rows, itemsize = key.rows, key.itemsize
    if rows <= (12 if itemsize > 2 else 8):
        block, V, threads = gramian_setting(itemsize)
        yield GramianSetting(block, V, threads)
        yield GramianSetting(block // 2, V, threads // 2)
        yield GramianSetting(2 * block, V, 2 * threads)
        if rows <= 4:  # with more rows the accumulators would not fit into registers
            yield GramianSetting(2 * block, V, threads)
    if rows >= 8:
        dot = dot_setting(max(rows, 33) if rows == 40 else rows, itemsize)
        yield dot
        yield dot._replace(threads=2 * dot.threads)
        if 2 * dot.BLOCK <= dot.CHAIN:
            yield dot._replace(BLOCK=2 * dot.BLOCK, threads=2 * dot.threads)


def _pieces(key: Key) -> Iterator[Setting]:
    """Yield fewer and more pieces. None is longer than the default, since that bounds the error."""
    for programs in (2048, 4096, 8192, 16384):
        yield PieceSetting(programs, 64)


def _combine(key: Key) -> Iterator[Setting]:
    """Yield a whole tile a program too."""
    yield from _tiles(key)
    yield TileSetting(TILE, 256)


def _tiles(key: Key) -> Iterator[Setting]:
    """Yield half, once and twice the elements a thread, and half and twice the threads; no loads below 128 bits."""
    for block, threads in ((1024, 128), (512, 128), (2048, 128), (512, 64), (1024, 256), (2048, 256)):
        if block * key.itemsize >= 16 * threads:
            yield TileSetting(block, threads)


def _one_launch(key: Key) -> Iterator[Setting]:
    """Yield no size, and every run of neighbouring measured sizes."""
    yield Sizes(0, 0)
    for size in ONE_LAUNCH_SIZES:
        yield Sizes(size, size + 1)
    for first, last in combinations(ONE_LAUNCH_SIZES, 2):
        yield Sizes(first, last + 1)


def _chunks(key: Key) -> Iterator[Setting]:
    """Yield shorter chunks, never longer ones, which would break the error bound; and half and twice the memory."""
    for scratch in (SCRATCH // 2, SCRATCH, 2 * SCRATCH):
        yield ChunkSetting(LONGEST, scratch)
    yield ChunkSetting(LONGEST // 2, SCRATCH)


def _columns(key: Key) -> Iterator[Setting]:
    for columns in (COLUMNS // 8, COLUMNS // 2, COLUMNS, 2 * COLUMNS):
        yield ColumnSetting(columns)


_LISTS = {
    "gramian": _gramian,
    "pieces": _pieces,
    "combine": _combine,
    "adamw": _tiles,
    "project": _tiles,
    "one_launch": _one_launch,
    "chunks": _chunks,
    "columns": _columns,
}
