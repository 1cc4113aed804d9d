"""Tests of ``gradkern tune`` on this machine's CPU, from the command line to the process that reads the table."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradkern import cli
from gradkern.check import selfcheck
from gradkern.kernels.served import served
from gradkern.ops.devices import CPU
from gradkern.ops.pytorch.chunks import LONGEST, SCRATCH, ChunkSetting
from gradkern.ops.pytorch.combination import COLUMNS, ColumnSetting
from gradkern.ops.tables import candidates, places
from gradkern.ops.triton.backend import BACKEND
from gradkern.tuning import clock, command
from gradkern.tuning.progress import bar
from tests.tuning.conftest import Clock, read_anew

TUNE = ["tune", "--device", "cpu", "--minutes"]
SHORTER = ChunkSetting(LONGEST // 2, SCRATCH)


def faster_in_shorter_chunks() -> float:
    return 0.5 if served["chunks", 3, 4, CPU] == SHORTER else 1.0


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_tiny_budget_writes_a_table_of_what_was_reached(
    place: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TUNE, "1e-3"]) == 0
    printed = capsys.readouterr()
    told = json.loads(place.read_text())
    assert files(cache) == [place]
    assert [(e["kernel"], e["rows"], e["itemsize"]) for e in told["settings"]][:1] == [("chunks", 3, 4)]
    assert told["refused"] == []
    assert all(e["seconds"] > 0 and e["share of copy"] > 0 for e in told["settings"])
    assert f"written to {place}; later processes read it" in printed.out
    assert "0 keep the settings of an earlier table, and 1 the defaults" in printed.out
    assert printed.err.startswith("[1/2] chunks, T = 3, float32\n")


def test_what_is_not_reached_again_keeps_what_an_earlier_table_has(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TUNE, "1e-3"]) == 0
    told = json.loads(place.read_text())
    earlier = {"kernel": "columns", "rows": 3, "itemsize": 4, "setting": {"COLUMNS": COLUMNS // 2}}
    told["settings"].append(earlier)
    place.write_text(json.dumps(told))
    assert cli.main([*TUNE, "1e-3"]) == 0
    assert json.loads(place.read_text())["settings"][1:] == [earlier]
    assert "1 keep the settings of an earlier table, and 0 the defaults" in capsys.readouterr().out


def test_a_later_process_computes_under_the_table(
    place: Path, stopped: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Give it the table by the variable. Chunks are half as long for up to three rows of float32, and for no others."""
    stopped(faster_in_shorter_chunks)
    assert cli.main([*TUNE, "60"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("chunks         3  float32"))
    assert line.endswith("LONGEST 1,024, SCRATCH 524,288")
    assert "500.000 ms" in line
    settings = json.loads(place.read_text())["settings"]
    chosen = [e for e in settings if e["setting"] == SHORTER._asdict()]
    assert [(e["kernel"], e["rows"], e["itemsize"]) for e in chosen] == [("chunks", 3, 4)]
    code = """
import gradkern, torch
from gradkern.ops.pytorch.chunks import cut
print([cut(T, 1 << 22, itemsize).width for T, itemsize in ((2, 4), (3, 4), (4, 4), (3, 8))])
J = torch.ones(3, 1 << 21)
assert torch.equal(gradkern.gramian(J), J @ J.mT)
"""
    for variable, widths in ((str(place), [1024, 1024, 2048, 2048]), ("off", [2048] * 4)):
        environment = os.environ | {places.VARIABLE: variable}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.stdout.strip(), done.stderr) == (str(widths), "")


def test_info_tells_which_table_serves(
    place: Path, stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck, "checks", lambda device_type: {})
    monkeypatch.setattr(selfcheck, "differences", lambda: iter([]))
    monkeypatch.setattr(selfcheck, "on_the_cpu", dict)  # it starts a process

    def told() -> str:
        read_anew()
        assert cli.main(["info"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        return next(line for line in lines if line.startswith("settings: "))

    assert told() == "settings: default settings"
    stopped(faster_in_shorter_chunks)
    assert cli.main([*TUNE, "60"]) == 0
    assert told().startswith(f"settings: {place}, measured 20")
    assert f"torch {torch.__version__}" in told()
    monkeypatch.setenv(places.VARIABLE, "off")
    assert told() == "settings: default settings (GRADKERN_TUNING is off)"


def test_the_variable_names_what_is_written_unless_out_does(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named, out = tmp_path / "named.json", tmp_path / "new" / "out.json"
    monkeypatch.setenv(places.VARIABLE, str(named))
    assert cli.main([*TUNE, "1e-6"]) == 0
    assert named.exists()
    assert cli.main([*TUNE, "1e-6", "--out", str(out)]) == 0
    assert f"processes read it under GRADKERN_TUNING={out}" in capsys.readouterr().out
    monkeypatch.setenv(places.VARIABLE, "off")
    assert cli.main([*TUNE, "1e-6"]) == 0
    assert "no process reads a table while GRADKERN_TUNING is off" in capsys.readouterr().out
    assert {path.name for path in files(tmp_path)} >= {"named.json", "out.json"}
    assert len(files(cache)) == 1


def test_wrong_settings_are_refused_and_the_others_measured(
    place: Path, stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One leaves results unwritten, the other divides by zero. Both would be the fastest."""
    unwritten, raising = ColumnSetting(-1), ChunkSetting(0, 0)
    known = candidates.candidates
    planted = {"columns": unwritten, "chunks": raising}
    monkeypatch.setattr("gradkern.tuning.tune.candidates", lambda key: [*known(key), planted[key.kernel]])
    stopped(lambda: 0.1 if served["columns", 3, 4, CPU] == unwritten else faster_in_shorter_chunks())
    assert cli.main([*TUNE, "60"]) == 1
    printed, told = capsys.readouterr().out, json.loads(place.read_text())
    assert [printed.count("WRONG, COLUMNS -1"), printed.count("WRONG, LONGEST 0")] == [1, 1]
    assert [e["kernel"] for e in told["settings"]] == ["chunks", "columns"]
    assert [e["kernel"] for e in told["refused"]] == ["chunks", "columns"]
    assert told["refused"][0]["problem"].startswith("ZeroDivisionError")
    assert told["refused"][1]["problem"].endswith("allowed")
    assert all(e["setting"] not in (unwritten._asdict(), raising._asdict()) for e in told["settings"])
    assert SHORTER._asdict() in [e["setting"] for e in told["settings"]]


def test_the_default_setting_is_refused_too(
    place: Path, stopped: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ColumnSetting(-1)
    monkeypatch.setitem(served.tunable, "columns", served.tunable["columns"]._replace(default=lambda T, size: written))
    stopped(lambda: 1.0)
    assert cli.main([*TUNE, "60"]) == 1
    settings = [e for e in json.loads(place.read_text())["settings"] if e["kernel"] == "columns"]
    assert settings
    assert all(e["setting"]["COLUMNS"] > 0 and e["default share"] is None for e in settings)
    assert "    wrong     1%  COLUMNS" in capsys.readouterr().out


@pytest.mark.parametrize("at", ["the first time", "the last moment"])
def test_an_interrupt_leaves_the_old_table(
    at: str, place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **options: object) -> float:
        raise KeyboardInterrupt

    place.parent.mkdir(parents=True)
    place.write_text("old")
    if at == "the first time":
        monkeypatch.setattr(clock, "timed", interrupt)
    else:
        monkeypatch.setattr(places.os, "replace", interrupt)
    assert cli.main([*TUNE, "1e-6" if at == "the last moment" else "1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert files(cache) == [place]
    assert place.read_text() == "old"


def test_a_table_is_written_through_links_for_everybody(tmp_path: Path) -> None:
    """A link leads to the file that several machines share, say, and other users read it."""
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    places.require_writable(tmp_path / "link.json")
    places.replace(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "file.json").read_text() == "new"
    (tmp_path / "usual").touch()
    assert (tmp_path / "file.json").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert len(files(tmp_path)) == 3


def test_a_table_takes_the_place_of_files_alone() -> None:
    """A superuser could replace /dev/null, and all programs would write to a table."""
    with pytest.raises(OSError, match="is no file"):
        places.require_writable(Path(os.devnull))


def test_a_user_without_a_home_directory_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> Path:
        raise FileNotFoundError("there is no place for tables")

    monkeypatch.setattr(places, "_cache", nowhere)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TUNE, "1e-6", "--out", "out.json"]) == 0
    assert f"written to out.json; processes read it under GRADKERN_TUNING={tmp_path / 'out.json'}" in (
        capsys.readouterr().out
    )


def test_a_reader_that_has_gone_loses_no_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``gradkern tune | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
    with pytest.raises(BrokenPipeError):
        cli.main([*TUNE, "1e-6"])
    assert json.loads(place.read_text())["settings"]


def test_a_failure_to_write_loses_no_report(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(places.os, "replace", full)
    assert cli.main([*TUNE, "1e-6"]) == 1
    printed = capsys.readouterr()
    assert "chunks         3  float32" in printed.out
    assert f"cannot write {place}: No space left on device" in printed.err
    assert files(place.parent) == []


@pytest.mark.parametrize("kind", ["below a file", "a folder"])
def test_an_unwritable_place_is_refused_before_anything_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "tuned", lambda *arguments: pytest.fail("it measures"))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "table.json" if kind == "below a file" else tmp_path
    assert cli.main([*TUNE, "1", "--out", str(out)]) == 1
    assert f"cannot write {out}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "'tpu' is not a device"),
        (["--device", "mps"], "'mps' is neither a CPU nor a CUDA device"),
        (["--device", "cuda:99"], "'cuda:99' is not on this machine"),
        (["--minutes", "0"], "'0' is not a positive number"),
        (["--minutes", "nan"], "'nan' is not a positive number"),
        (["--minutes", "three"], "'three' is not a positive number"),
        (["--out", ""], "'' is not a file"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(BACKEND, "unavailable", "Triton cannot be imported (No module named 'triton')")
    assert command.tune(torch.device("cuda"), 1.0, None) == 1
    assert "needs Triton on a GPU: Triton cannot be imported (No module named 'triton')" in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    for is_terminal, has_rich in ((True, True), (True, False), (False, True)):
        if has_rich and find_spec("rich") is None:
            continue
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, has_rich=has_rich: has_rich or None)
        with bar(2) as progress:
            progress("the first")
            progress("the second")
        shown = capsys.readouterr().err
        if is_terminal and has_rich:
            assert "done" in shown
            assert "2/2" in shown
        else:
            assert shown == "[1/2] the first\n[2/2] the second\n"
