"""``gradkern tune``: what it needs is looked at first, then it measures, writes the table, and tells of it."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from gradkern.kernels.served import Key
from gradkern.ops import backend
from gradkern.ops.devices import GPU
from gradkern.ops.tables import places
from gradkern.ops.tables.candidates import Setting, keys
from gradkern.ops.tables.card import Card, card_of
from gradkern.ops.tables.reading import read
from gradkern.ops.tables.table import Unfit, entry, text_of
from gradkern.ops.triton.backend import BACKEND
from gradkern.tuning import report
from gradkern.tuning.progress import bar
from gradkern.tuning.tune import tuned


def tune(device: torch.device, minutes: float, out: Path | None) -> int:
    """Measure a device and write its table. Return the exit status: 1 if a setting is wrong, or nothing can be done.

    Args:
        device: the device.
        minutes: the time for all measurements.
        out: the file to write; None for the one that processes read.
    """
    name, reason = backend(device.type)
    if device.type == GPU and name != BACKEND.name:
        return _failed(f"gradkern tune needs Triton on a GPU: {reason}")
    if device.type == GPU:
        device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    card = card_of(device)
    assert card is not None, "the command line takes no other device"
    path = out
    try:
        path = path or places.place(card)
        places.require_writable(path)
    except OSError as error:
        return _failed(f"cannot write {path or 'a table'}: {error.strerror or error}")
    todo = keys(card.kind)
    with bar(len(todo)) as progress:
        findings = tuned(todo, card.kind, device, 60 * minutes, progress)
    kept = _kept(path, card, findings.unreached)
    settings = report.settings(findings) + [entry(key, setting) for key, setting in kept.items()]
    failure = _written(path, text_of(card, datetime.now(UTC), settings, report.refused(findings)))
    print(f"{card.name}\n{report.text(findings, card.kind, len(kept))}")
    if failure is not None:
        return _failed(failure)
    print(f"written to {path}; {_read_by(path, card)}")
    return 1 if findings.refused else 0


def _kept(path: Path, card: Card, unreached: Sequence[Key]) -> dict[Key, Setting]:
    """Return the settings that an earlier table of the card has for what time has not reached."""
    try:
        earlier = read(path, card).choices
    except Unfit:
        return {}
    return {key: earlier[key] for key in unreached if key in earlier}


def _written(path: Path, made: str) -> str | None:
    """Write a table and return why that fails, if it does. It comes before the report, whose reader may have gone."""
    try:
        places.replace(path, made)
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    return None


def _read_by(path: Path, card: Card) -> str:
    """Return who reads a table, in words."""
    if places.named() == places.OFF:
        return f"no process reads a table while {places.VARIABLE} is {places.OFF}"
    with suppress(OSError):  # a user without a home directory has no place for tables
        if path.absolute() == places.place(card).absolute():
            return "later processes read it"
    return f"processes read it under {places.VARIABLE}={path.absolute()}"


def _failed(text: str) -> int:
    print(text, file=sys.stderr)
    return 1
