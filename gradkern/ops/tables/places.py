"""Where tables lie: a file for each card in the user's cache directory, or the file that ``GRADKERN_TUNING`` names."""

import os
import re
import secrets
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from gradkern.ops.tables.card import Card

VARIABLE = "GRADKERN_TUNING"
"""The environment variable that names the file to read, or is ``OFF``."""
OFF = "off"


def named() -> str | None:
    """Return what the environment variable says; None if it says nothing."""
    return os.environ.get(VARIABLE) or None


def place(card: Card) -> Path:
    """Return the file that processes read for a card, and that the command writes."""
    name = named()
    return default_place(card) if name is None or name == OFF else Path(name)


def default_place(card: Card) -> Path:
    """Return the file of a card in the cache directory. Its name carries the card's.

    Raises:
        FileNotFoundError: the user has no home directory.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")
    return _cache() / "gradkern" / "tuning" / f"{card.kind}-{plain}.json"


def _cache() -> Path:
    """Return the directory in which a user's programs keep files that they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # as in a container whose user has no name
        raise FileNotFoundError(f"there is no place for tables: {error}") from None


def require_writable(path: Path) -> None:
    """Make the folder of a file that is to be written, and raise OSError if the file cannot be."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a folder, or a device, which the table would take the place of
        raise OSError(f"{path} is no file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def replace(path: Path, text: str) -> None:
    """Write a file as a whole: whatever goes wrong, the old one stays. A link stays too, and its file is replaced."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")  # with the user's usual permissions, unlike files of tempfile's
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
