"""A table as text: JSON that tells its card, its versions and when it was made, and names one candidate for each key.

Reading trusts nothing. A table serves only its own card under its own versions, and each of its settings is looked up
among the candidates. What else the file holds, such as times, is for people.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gradkern.kernels.served import Choices, Key
from gradkern.ops.tables.candidates import KERNELS, Setting, candidates, keys
from gradkern.ops.tables.card import Card

FORMAT = 1


class Unfit(ValueError):
    """A table cannot serve a card; the text says why."""


class OtherKind(Unfit):
    """It is the table of another kind of device."""


@dataclass(frozen=True)
class Table:
    """A table that serves a card.

    Attributes:
        card: the card.
        date: when it was measured.
        choices: the settings.
    """

    card: Card
    date: datetime
    choices: Choices


def text_of(card: Card, date: datetime, settings: list[dict[str, Any]], refused: list[dict[str, Any]]) -> str:
    """Return the text of a table.

    Args:
        card: the card.
        date: when it was measured.
        settings: for each key what :func:`entry` returns, and numbers for people.
        refused: the candidates that gave wrong results, for people.
    """
    told = {
        "format": FORMAT,
        "kind": card.kind,
        "card": card.name,
        "versions": dict(card.versions),
        "date": date.isoformat(timespec="seconds"),
        "settings": settings,
        "refused": refused,
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def entry(key: Key, setting: Setting) -> dict[str, Any]:
    """Return a key and its setting in the form that a table has."""
    return {**key._asdict(), "setting": setting._asdict()}


def parsed(text: str, card: Card) -> Table:
    """Return the table for a card.

    Raises:
        Unfit: it cannot serve that card.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise Unfit("it holds no table")
    if told.get("format") != FORMAT:
        raise Unfit(f"it has format {told.get('format')!r:.50}, and this version of gradkern reads format {FORMAT}")
    kind = told.get("kind")
    if kind != card.kind:
        unfit = OtherKind if kind in tuple(KERNELS) else Unfit  # a tuple takes any value, also one that has no hash
        raise unfit(f"it is for a device of type {kind!r:.50}, not {card.kind}")
    if told.get("card") != card.name:
        raise Unfit(f"it is for {told.get('card')!r:.200}, not {card.name!r}")
    if told.get("versions") != dict(card.versions):
        own = ", ".join(f"{name} {version}" for name, version in card.versions)
        raise Unfit(f"it was measured under other versions than {own}: {told.get('versions')!r:.200}")
    return Table(card, _date(told.get("date")), _choices(told.get("settings"), card))


def _date(text: Any) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise Unfit(f"its date is {text!r:.50}") from None


def _choices(entries: Any, card: Card) -> Choices:
    if not isinstance(entries, list):
        raise Unfit("it has no list of settings")
    known = {tuple(key): key for key in keys(card.kind)}
    choices: dict[Key, Setting] = {}
    for each in entries:
        try:
            key = known[each["kernel"], each["rows"], each["itemsize"]]
            setting = each["setting"]
        except (KeyError, TypeError):
            raise Unfit(f"this version of gradkern has no such launches: {each!r:.200}") from None
        found = [candidate for candidate in candidates(key) if candidate._asdict() == setting]
        if not found:
            raise Unfit(f"this version of gradkern has no such setting: {each!r:.200}")
        if key in choices:
            raise Unfit(f"it has two settings for {key.kernel}, {key.rows} rows, {key.itemsize} bytes")
        (choices[key],) = found
    return choices
