"""Tests of the table that serves a device: damaged and foreign files are ignored with one warning that says why."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import gradkern as gk
from gradkern import cli
from gradkern.kernels.served import Key, served
from gradkern.kernels.settings import ONE_LAUNCH, Sizes
from gradkern.ops.devices import CPU
from gradkern.ops.pytorch.chunks import LONGEST, SCRATCH, ChunkSetting, cut
from gradkern.ops.tables import places, reading
from gradkern.ops.tables.candidates import KERNELS, Setting, candidates, keys
from gradkern.ops.tables.card import Card
from gradkern.ops.tables.places import default_place
from gradkern.ops.tables.reading import serving
from gradkern.ops.tables.table import entry, parsed, text_of
from tests.tuning.conftest import read_anew

CACHE = places._cache
"""The function, which each test replaces."""
KEY = Key("chunks", 3, 4)
SHORTER = ChunkSetting(LONGEST // 2, SCRATCH)
DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def table(card: Card, *entries: dict[str, Any]) -> str:
    return text_of(card, DATE, list(entries) or [entry(KEY, SHORTER)], [])


def write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    read_anew()


def width() -> int:
    """The width of chunks under the table that serves, and the proof that the Gramian is right."""
    J = torch.ones(3, 1 << 21)
    assert torch.equal(gk.gramian(J), J @ J.mT)
    return cut(3, 1 << 21, 4).width


def test_a_table_serves_its_card(card: Card, place: Path) -> None:
    write(place, table(card))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert width() == LONGEST // 2
    assert serving(CPU).choices == {KEY: SHORTER}
    under = ", ".join(f"{name} {version}" for name, version in card.versions)
    assert serving(CPU).origin == f"{place}, measured 2026-01-02 under {under}"


def test_a_table_is_read_once(card: Card, place: Path) -> None:
    write(place, table(card))
    assert width() == LONGEST // 2
    place.unlink()
    cut.cache_clear()
    served.clear()
    assert width() == LONGEST // 2


def changed(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda told: json.dumps(told | changes)


def with_entry(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda told: json.dumps(told | {"settings": [told["settings"][0] | changes]})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "empty": (lambda told: "", "it is not JSON"),
    "cut off": (lambda told: json.dumps(told)[:-9], "it is not JSON"),
    "nested": (lambda told: "[" * 100_000, "it is not JSON"),
    "a list": (lambda told: "[]", "it holds no table"),
    "long": (lambda told: json.dumps(told) + " " * reading.LARGEST, "it has more than"),
    "format": (changed(format=2), "it has format 2, and this version of gradkern reads format 1"),
    "no format": (lambda told: "{}", "it has format None"),
    "kind": (changed(kind="tpu"), "it is for a device of type 'tpu', not cpu"),
    "no kind": (changed(kind=None), "it is for a device of type None, not cpu"),
    "a list as kind": (changed(kind=["cuda"]), "it is for a device of type ['cuda'], not cpu"),
    "card": (changed(card="another"), "it is for 'another', not"),
    "gradkern": (changed(versions={"gradkern": "9.9"}), "it was measured under other versions than gradkern"),
    "numbers of versions": (lambda told: json.dumps(told | {"versions": told["versions"] | {"torch": 5}}), "versions"),
    "versions": (changed(versions=None), "it was measured under other versions"),
    "date": (changed(date="yesterday"), "its date is 'yesterday'"),
    "no date": (changed(date=None), "its date is None"),
    "settings": (changed(settings=None), "it has no list of settings"),
    "no entry": (changed(settings=["x"]), "no such launches: 'x'"),
    "kernel": (with_entry(kernel="gramian"), "no such launches"),
    "rows": (with_entry(rows=5), "no such launches"),
    "unhashable": (with_entry(rows=[3]), "no such launches"),
    "numbers": (with_entry(setting={"LONGEST": 4096, "SCRATCH": SCRATCH}), "no such setting"),
    "text": (with_entry(setting={"LONGEST": "2048", "SCRATCH": SCRATCH}), "no such setting"),
    "too many": (with_entry(setting=SHORTER._asdict() | {"x": 1}), "no such setting"),
    "too few": (with_entry(setting={"LONGEST": 1024}), "no such setting"),
    "no setting": (with_entry(setting=None), "no such setting"),
    "twice": (lambda told: json.dumps(told | {"settings": 2 * told["settings"]}), "it has two settings for chunks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_or_foreign_table_is_ignored_with_one_warning(what: str, card: Card, place: Path) -> None:
    damage, why = WRONG[what]
    write(place, damage(json.loads(table(card))))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert width() == LONGEST
        cut.cache_clear()
        served.clear()
        assert width() == LONGEST
        gk.combine(torch.ones(3, 5), torch.ones(3))
    (warning,) = warned
    assert f"the tuning table {place} is ignored" in str(warning.message)
    assert why in str(warning.message)
    assert "gradkern tune" in str(warning.message)
    assert serving(CPU).origin.startswith(f"default settings ({place} is ignored: ")


def test_bytes_that_are_no_text_are_damage(place: Path) -> None:
    write(place, "")
    place.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="it is not text"):
        assert width() == LONGEST


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_named_file_must_be_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path if kind == "a folder" else tmp_path / "missing.json"
    monkeypatch.setenv(places.VARIABLE, str(named))
    with pytest.warns(UserWarning, match="it cannot be read: "):
        assert width() == LONGEST


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, opened = tmp_path / "pipe", Path.open

    def open_file(path: Path, *arguments: Any, **options: Any) -> Any:
        assert path != pipe, "it waits for a writer"
        return opened(path, *arguments, **options)

    os.mkfifo(pipe)
    monkeypatch.setenv(places.VARIABLE, str(pipe))
    monkeypatch.setattr(Path, "open", open_file)
    with pytest.warns(UserWarning, match="it cannot be read: it is no file"):
        assert width() == LONGEST


def test_a_sandbox_may_hide_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch asks for its name, and must not fail for it."""

    def hidden(path: Path) -> str:
        raise PermissionError(f"{path} is hidden")

    monkeypatch.setattr(Path, "read_text", hidden)
    assert width() == LONGEST


def test_off_reads_nothing(card: Card, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, table(card))
    monkeypatch.setenv(places.VARIABLE, "off")
    monkeypatch.setattr(Path, "open", lambda *arguments: pytest.fail("it reads"))
    assert width() == LONGEST


def test_tables_of_other_cards_are_not_looked_at(card: Card, place: Path) -> None:
    other = card._replace(name="another card")
    assert default_place(other).parent == place.parent
    write(default_place(other), "damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert width() == LONGEST
    assert serving(CPU).origin == "default settings"


def test_a_named_table_of_a_gpu_leaves_the_cpu_as_defaults(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on that GPU has a CPU too, so there is nothing to warn of."""
    gpu = Card("cuda", "a GPU", (*card.versions, ("triton", "3.7")))
    (tmp_path / "gpu.json").write_text(table(gpu, entry(*first_of_gpu())))
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "gpu.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert width() == LONGEST
    assert "does not serve it: it is for a device of type 'cuda', not cpu" in serving(CPU).origin
    assert parsed((tmp_path / "gpu.json").read_text(), gpu).choices == dict([first_of_gpu()])


def first_of_gpu() -> tuple[Key, Setting]:
    key = Key("gramian", 3, 4)
    return key, candidates(key)[1]


@pytest.mark.parametrize(
    ("platform", "variable", "folder"),
    [
        ("linux", "XDG_CACHE_HOME", "home/.cache"),
        ("darwin", None, "home/Library/Caches"),
        ("win32", "LOCALAPPDATA", "home/AppData/Local"),
    ],
)
def test_the_cache_directory_is_the_systems(
    platform: str, variable: str | None, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert CACHE() == tmp_path / folder
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "other"))
        assert CACHE() == tmp_path / "other"


def test_without_a_home_directory_nothing_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(places, "_cache", CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    read_anew()
    assert width() == LONGEST
    assert serving(CPU).origin == "default settings"
    assert cli.main(["tune", "--device", "cpu"]) == 1
    assert "cannot write a table: there is no place for tables: Could not" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KERNELS)
def test_every_candidate_can_be_written_and_read(kind: str, card: Card) -> None:
    card = card._replace(kind=kind)
    for key in keys(kind):
        known = candidates(key)
        assert len(set(known)) == len(known) > 1
        for setting in known:
            assert parsed(table(card, entry(key, setting)), card).choices == {key: setting}


def test_the_written_setting_is_the_first_candidate() -> None:
    for kind in KERNELS:
        for key in keys(kind):
            if key.kernel != "one_launch":
                assert candidates(key)[0] == served.tunable[key.kernel].default(key.rows, key.itemsize)


def test_ranks_agree_by_what_is_not_as_defaults(card: Card, place: Path) -> None:
    written = entry(KEY, candidates(KEY)[0])
    changed = []
    for entries in ([], [written], [entry(KEY, SHORTER)], [entry(KEY, candidates(KEY)[1])]):
        write(place, text_of(card, DATE, entries, []))
        changed.append(serving(CPU).changed)
    assert changed[0] == changed[1]
    assert len(set(changed)) == 3


def test_ranks_agree_with_a_table_that_chooses_no_one_launch() -> None:
    """Without a table there is none either, so bits are the same."""
    key = Key("one_launch", 3, 4)
    assert ONE_LAUNCH == {}
    assert reading._changed({key: Sizes(0, 0)}) == ()
    assert reading._changed({key: Sizes(10**5, 10**5 + 1)}) == ((*key, 10**5, 10**5 + 1),)
