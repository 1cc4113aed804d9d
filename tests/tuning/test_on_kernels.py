"""Tests of ``gradkern tune`` on the kernels: they run in Triton's interpreter, as if this CPU were a GPU.

The card is made up, and so are the times. Checks, choices, the table and the launches under it are real.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import gradkern as gk
from gradkern.check import cases
from gradkern.kernels.launch import Launch
from gradkern.kernels.served import Key, one_launch, served
from gradkern.kernels.settings import DotSetting, GramianSetting, PieceSetting, Sizes, TileSetting, dot_setting
from gradkern.ops import operators
from gradkern.ops.devices import CPU
from gradkern.ops.tables import candidates, reading
from gradkern.ops.tables.card import Card
from gradkern.ops.tables.places import default_place
from gradkern.ops.tables.table import entry, text_of
from gradkern.tuning import command, contest, inputs, subjects
from tests import interpreter
from tests.tuning.conftest import Clock, read_anew

pytestmark = interpreter.interpreted
GPU = Card("cuda", "a GPU that is not there", (("gradkern", gk.__version__), ("triton", "3.7")))
LENGTHS = (64, 128)


@pytest.fixture(autouse=True)
def _as_if_on_a_gpu(triton_serves_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, reading):
        monkeypatch.setattr(module, "card_of", lambda device: GPU)
    monkeypatch.setattr(inputs, "BYTES", {"cpu": 1 << 11})
    monkeypatch.setattr(subjects, "TILES", 77)
    monkeypatch.setattr(contest, "FEWEST", 1)
    monkeypatch.setattr(contest, "MOST", 1)
    monkeypatch.setattr(candidates, "ONE_LAUNCH_SIZES", LENGTHS)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Give a function that tunes some keys, and returns the exit status."""

    def run(*todo: Key) -> int:
        monkeypatch.setattr(command, "keys", lambda kind: list(todo))
        status = command.tune(CPU, 60, None)
        read_anew()
        return status

    return run


CHOSEN = {
    Key("gramian", 3, 4): GramianSetting(256, 4, 64),
    Key("pieces", 4, 4): PieceSetting(2048, 64),
    Key("combine", 3, 2): TileSetting(4096, 256),
    Key("project", 2, 4): TileSetting(512, 128),
    Key("adamw", 3, 4): TileSetting(2048, 256),
}


@pytest.mark.parametrize("key", CHOSEN, ids=lambda key: key.kernel)
def test_the_fastest_setting_is_launched(key: Key, tune: Callable[..., int], stopped: Clock) -> None:
    chosen = CHOSEN[key]
    launch = (key.kernel, key.rows, key.itemsize, CPU)
    stopped(lambda: 0.5 if served[launch] == chosen else 1.0)
    assert tune(key) == 0
    (told,) = json.loads(default_place(GPU).read_text())["settings"]
    assert told["setting"] == chosen._asdict()
    assert told["share of copy"] == pytest.approx(2 * told["default share"])
    assert served[launch] == chosen
    assert served[key.kernel, 40, key.itemsize, CPU] != chosen


def test_launches_are_made_with_the_tables_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this table two rows have half the threads, and nine to twelve rows the form on tl.dot."""
    half, dot = GramianSetting(256, 4, 64), dot_setting(12, 4)
    chosen = [entry(Key("gramian", 2, 4), half), entry(Key("gramian", 12, 4), dot)]
    place = default_place(GPU)
    place.parent.mkdir(parents=True)
    place.write_text(text_of(GPU, datetime.now(UTC), chosen, []))
    launched: list[Launch] = []
    run = Launch.run

    def noted(launch: Launch, device: torch.device) -> None:
        launched.append(launch)
        run(launch, device)

    monkeypatch.setattr(Launch, "run", noted)
    registers, on_dot = "gramian_kernel", "gramian_dot_kernel"
    for T, name, threads in ((2, registers, 64), (3, registers, 128), (9, on_dot, dot.threads), (12, on_dot, 32)):
        J = torch.randint(-8, 9, (T, 70)).float()  # all sums are exact
        assert torch.equal(gk.gramian(J), J @ J.mT)
        gramian, _reduce = launched[-2:]
        assert (gramian.kernel.__name__, gramian.threads) == (name, threads)


def test_one_launch_gets_the_sizes_at_which_it_wins(
    tune: Callable[..., int],
    stopped: Clock,
    triton_serves_the_cpu: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cases, "MASKS", (None,))  # the others take seconds
    stopped(lambda: 0.5 if triton_serves_the_cpu[-1] == "surgery" else 1.0)
    assert one_launch(3, 4, CPU) == range(0)
    assert tune(Key("one_launch", 3, 4)) == 0
    assert one_launch(3, 4, CPU) == range(64, 129)
    assert one_launch(4, 4, CPU) == one_launch(3, 2, CPU) == range(0)
    assert "faster than three 64 to 128 numbers; its time over theirs: 0.50 at 64" in capsys.readouterr().out


def test_one_launch_that_is_slower_gets_none(
    tune: Callable[..., int], stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradkern.tuning.tune.problem", lambda *arguments: None)  # it takes seconds
    stopped(lambda: 1.0)
    assert tune(Key("one_launch", 2, 4)) == 0
    (told,) = json.loads(default_place(GPU).read_text())["settings"]
    assert told["setting"] == Sizes(0, 0)._asdict()
    assert "at no length" in capsys.readouterr().out


def test_a_wrong_setting_is_refused(
    tune: Callable[..., int], stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its chains are shorter than its blocks, so that products are counted twice."""
    wrong, key = DotSetting(16, 64, 32, 32), Key("gramian", 16, 4)
    known = candidates.candidates
    monkeypatch.setattr("gradkern.tuning.tune.candidates", lambda key: [*known(key), wrong])
    stopped(lambda: 0.1 if served["gramian", 16, 4, CPU] == wrong else 1.0)
    assert tune(key) == 1
    told = json.loads(default_place(GPU).read_text())
    assert told["settings"][0]["setting"] == known(key)[0]._asdict()
    assert told["refused"][0]["setting"] == wrong._asdict()
    assert "WRONG, ROWS 16, BLOCK 64, CHAIN 32, threads 32: float32" in capsys.readouterr().out


def test_a_wrong_one_launch_is_refused(
    tune: Callable[..., int], stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(lambda: 1.0)
    with monkeypatch.context() as patched:
        patched.setitem(operators.surgery.implementations, "cpu", lambda *arguments: 1 / 0)
        assert tune(Key("one_launch", 3, 4)) == 1
    told = json.loads(default_place(GPU).read_text())
    assert (told["settings"], told["refused"][0]["setting"]) == ([], None)
    assert "WRONG, the kernel itself: ZeroDivisionError" in capsys.readouterr().out


def test_a_table_of_the_cpus_leaves_kernels_as_written(card: Card, place: Path) -> None:
    """The interpreter and builds for other machines launch on CPU tensors. No table of a CPU names a kernel."""
    assert {key.kernel for key in candidates.keys(card.kind)}.isdisjoint(candidates.KERNELS["cuda"])
    for kernel in candidates.KERNELS["cuda"]:
        for T in (1, 3, 13, 40, 64):
            assert served[kernel, T, 4, CPU] == served.tunable[kernel].default(T, 4)
