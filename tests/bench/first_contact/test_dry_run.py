"""A dry run of some steps, as the command runs them: child processes, their files, and the printed summary."""

import json
from pathlib import Path

import pytest

from bench.first_contact.__main__ import main
from bench.first_contact.plan import SUMMARY
from bench.first_contact.summary import LAUNCHES
from bench.first_contact.sweep import cases


def test_a_dry_run_of_some_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry", "--only", "host", "sweep", "ncu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / SUMMARY[0]).read_text())
    assert summary["dry"]
    assert summary["machine"]["device"] == "cpu"
    found = {step["name"]: (step["status"], step["message"]) for step in summary["steps"]}
    assert found["sweep"] == ("passed", "cases measured: 70 of 70")
    assert found["host"][1].endswith("0 gradients copied")
    assert found["ncu"] == ("skipped", "the program passes; a dry run does not call ncu")
    assert list(found) == ["sweep", "host", "ncu"]
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "host.json", *SUMMARY}
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert len(results["rows"]) == len(cases(1))
    assert LAUNCHES not in results
    assert (tmp_path / SUMMARY[1]).read_text() in out
