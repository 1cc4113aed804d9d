"""The settings that launches take: those of a measured table where one serves the device, else the defaults.

A launcher finds its setting with one look into a dictionary. Only the first launch of its kind on a device takes more:
it asks for the device's table. ``gradkern tune`` writes these tables, and nothing else changes a setting.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import settings


class Key(NamedTuple):
    """The launches that share a setting."""

    kernel: str
    rows: int
    """The most rows, T, of these launches; one of the kernel's :attr:`Tunable.rows`."""
    itemsize: int
    """Bytes of a number."""


class Tunable(NamedTuple):
    """A kernel that a table may have settings for."""

    rows: tuple[int, ...]
    """The T that it is measured at, ascending. A setting serves the T from the last one on up to its own. The greatest
    serves all larger T too."""
    default: Callable[[int, int], Any]
    """The setting without a table, by T and the bytes of a number."""


Choices = Mapping[Key, Any]


class Served(dict[tuple[str, int, int, torch.device], Any]):
    """The settings in use, by kernel, T, bytes of a number, and device.

    Attributes:
        tunable: the kernels, by name.
        table: returns the choices of the table that serves a device, none if there is no table.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tunable: dict[str, Tunable] = {}
        self.table: Callable[[torch.device], Choices] = lambda device: {}

    def __missing__(self, launch: tuple[str, int, int, torch.device]) -> Any:
        kernel, T, itemsize, device = launch
        chosen = self.table(device).get(self.key(kernel, T, itemsize))
        self[launch] = setting = self.tunable[kernel].default(T, itemsize) if chosen is None else chosen
        return setting

    def key(self, kernel: str, T: int, itemsize: int) -> Key:
        """Return the key of the launches on T rows."""
        rows = self.tunable[kernel].rows
        return Key(kernel, rows[min(bisect_left(rows, T), len(rows) - 1)], itemsize)


def _gramian(T: int, itemsize: int) -> settings.GramianSetting | settings.DotSetting:
    if settings.register_form(T, itemsize):
        return settings.gramian_setting(itemsize)
    return settings.dot_setting(T, itemsize)


ROWS = (2, 3, 4, 8, 12, 16, 32, 40)
"""The usual numbers of tasks, and those at which the default settings change. From 33 rows on nothing changes."""

served = Served()
served.tunable |= {
    "gramian": Tunable(ROWS, _gramian),
    "pieces": Tunable(
        (4, 12, 40), lambda T, itemsize: settings.PieceSetting(settings.PROGRAMS, settings.LONGEST_PIECE)
    ),
    "combine": Tunable(ROWS, lambda T, itemsize: settings.combine_setting()),
    "project": Tunable(ROWS, lambda T, itemsize: settings.project_setting(itemsize)),
    "adamw": Tunable(ROWS, lambda T, itemsize: settings.adamw_setting(itemsize)),
    "one_launch": Tunable(tuple(range(2, settings.ONE_LAUNCH_T + 1)), lambda T, itemsize: None),
}


def setting_for(kernel: str, rows: Any) -> Any:
    """Return the setting for a launch on ``rows`` (``rows.Rows``)."""
    return served[kernel, rows.count, rows.dtype.itemsize, rows.source.device]


def one_launch(T: int, itemsize: int, device: torch.device) -> range:
    """Return the lengths of T rows, of numbers of ``itemsize`` bytes, for which one launch does the surgery."""
    if not settings.one_launch_works(T):
        return range(0)
    measured = served["one_launch", T, itemsize, device]
    return settings.ONE_LAUNCH.get((T, itemsize), range(0)) if measured is None else range(*measured)
