"""The table that serves a device. A file is read once in a process, before the first launch on the device."""

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch

from gradkern.kernels.served import Choices, Key, served
from gradkern.kernels.settings import ONE_LAUNCH, Sizes
from gradkern.ops.tables.candidates import Setting
from gradkern.ops.tables.card import Card, card_of
from gradkern.ops.tables.places import OFF, VARIABLE, default_place, named
from gradkern.ops.tables.table import OtherKind, Table, Unfit, parsed

LARGEST = 1 << 20
"""The most bytes that are read. A table has some tens of thousands."""


class Serving(NamedTuple):
    """What serves a device."""

    choices: Choices
    origin: str
    """Where it comes from, in words."""
    changed: tuple[tuple[Any, ...], ...]
    """The choices that are not the defaults, sorted: ranks that have the same ones take the same settings."""


def serving(device: torch.device) -> Serving:
    """Return the settings that serve a device, and where they come from.

    Warns:
        UserWarning: a file cannot serve the device. It comes once for a file.
    """
    with _lock:  # two threads would warn twice
        return _serving(device)


@cache
def _serving(device: torch.device) -> Serving:
    name = named()
    if name == OFF:
        return _defaults(f"({VARIABLE} is {OFF})")
    card = card_of(device)
    if card is None:
        return _defaults()
    path = _default(card) if name is None else Path(name)
    if path is None:
        return _defaults()
    try:
        table = read(path, card)
    except OtherKind as error:  # the variable names the table of a GPU, say, and the process has a CPU too
        return _defaults(f"({path} does not serve it: {error})")
    except Unfit as error:
        if path not in _warned:
            _warned.add(path)
            warnings.warn(
                f"the tuning table {path} is ignored, and the default settings serve {device}: {error}. Write it anew "
                f"by gradkern tune, or set {VARIABLE}={OFF}",
                stacklevel=2,
            )
        return _defaults(f"({path} is ignored: {error})")
    return Serving(table.choices, _told(path, table), _changed(table.choices))


def _defaults(*why: str) -> Serving:
    return Serving({}, " ".join(("default settings", *why)), ())


def _changed(choices: Choices) -> tuple[tuple[Any, ...], ...]:
    return tuple(sorted([(*key, *setting) for key, setting in choices.items() if not _is_default(key, setting)]))


def _is_default(key: Key, setting: Setting) -> bool:
    if isinstance(setting, Sizes):
        return range(*setting) == ONE_LAUNCH.get((key.rows, key.itemsize), range(0))
    return bool(setting == served.tunable[key.kernel].default(key.rows, key.itemsize))


def _default(card: Card) -> Path | None:
    """Return the file of a card in the cache directory; None if there is none, or nobody may look."""
    try:
        path = default_place(card)
        return path if path.exists() else None
    except OSError:
        return None


def read(path: Path, card: Card) -> Table:
    """Return the table in a file; raise Unfit if it cannot serve the card."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe might wait for ever
            raise Unfit("it cannot be read: it is no file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise Unfit(f"it has more than {LARGEST} bytes")
        return parsed(data.decode("utf-8"), card)
    except UnicodeDecodeError:
        raise Unfit("it is not text") from None
    except OSError as error:
        raise Unfit(f"it cannot be read: {error.strerror}") from None


def _told(path: Path, table: Table) -> str:
    versions: Mapping[str, str] = dict(table.card.versions)
    under = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{path}, measured {table.date:%Y-%m-%d} under {under}"


def forget() -> None:
    """Read files anew at the next launch."""
    _serving.cache_clear()
    _warned.clear()
    served.clear()


_lock = RLock()
_warned: set[Path] = set()
