"""Cases measured for first contact, and the copies of gradients that it counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.contestants import ONE_LAUNCH, OURS
from bench.first_contact import clones, measured, workers
from bench.first_contact.clones import THREADS, counted
from bench.first_contact.dry import kernels_serve
from bench.first_contact.summary import LAUNCHES, markdown
from bench.floors import COPY
from gradkern.gradients import aliasing
from tests import interpreter

# NumPy, in the interpreter, which divides what will not be used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

CPU = torch.device("cpu")
CASES = [Case(operation, 2, 1000) for operation in ("gramian", "combine", "project")]
SUMMARY = {"dry": True, "machine": {"model": "a card"}, "steps": []}


def test_a_case_that_fails_is_noted_and_the_others_are_saved_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measure, saved = tmp_path / "sweep.json", measured.measure_case, []

    def measure_some(case: Case, *rest: Any) -> dict[str, Any]:
        saved.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if case == CASES[1]:
            raise torch.OutOfMemoryError("out of memory\nand much more")
        return measure(case, *rest)

    monkeypatch.setattr(measured, "measure_case", measure_some)
    assert measured.measured(CASES, CPU, 0.001, path) == 1
    assert saved == [0, 1, 1]
    results = json.loads(path.read_text())
    assert [Case(**row["case"]) for row in results["rows"]] == [CASES[0], CASES[2]]
    assert all(row["contestants"].keys() == {OURS, COPY} for row in results["rows"])
    ((skipped,),) = [results["skipped"]]
    assert Case(**skipped["case"]) == CASES[1]
    assert skipped["why"] == "OutOfMemoryError: out of memory"


def test_a_case_that_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "measure_case", lambda *given: pytest.fail("tried"))
    path = tmp_path / "sweep.json"
    assert measured.measured([Case("gramian", 3, 10**13)], CPU, 0.001, path) == 1
    assert "needs about" in json.loads(path.read_text())["skipped"][0]["why"]


@pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))
def test_one_launch_is_measured_beside_three_in_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    with kernels_serve(CPU):
        assert measured.measured([Case("surgery", 2, 100, shapes="pieces")], CPU, 0.001, path, LAUNCHES) == 0
    ((row,), rows) = (results := json.loads(path.read_text()))[LAUNCHES], results["rows"]
    assert rows == []
    assert row["contestants"].keys() == {OURS, ONE_LAUNCH, COPY}
    ratio = row["ratios"][ONE_LAUNCH]["p50"]
    assert f"| T = 2, float32, by model | {ratio:.2f} |" in markdown(SUMMARY, tmp_path)


def test_the_summarys_tables_by_hand(tmp_path: Path) -> None:
    def row(operation: str, T: int, seconds: float, percent: float) -> dict[str, Any]:
        case = {"operation": operation, "T": T, "P": 10, "dtype": "float32"}
        return {"case": case, "contestants": {OURS: {"p50": seconds, "percent of copy": percent}}, "ratios": {}}

    rows = [row("gramian", 3, 0.0012, 91.4), row("combine", 3, 0.002, 88.6), row("combine", 8, 0.004, 95.0)]
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "tests.json").write_text(json.dumps({"failures": [{"test": "a.py::test_b", "message": "wrong"}]}))
    lines = markdown(SUMMARY, tmp_path).splitlines()
    assert "- a.py::test_b" in lines
    start = lines.index("| | gramian | combine |")
    assert lines[start + 2 :] == ["| T = 3, float32 | 1.2 (91) | 2 (89) |", "| T = 8, float32 |  | 4 (95) |"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damaged_files_of_others_are_left_out(text: str, tmp_path: Path) -> None:
    """Steps that do not run leave the files in the folder alone."""
    without = markdown(SUMMARY, tmp_path)
    for name in ("tests.json", "sweep.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert markdown(SUMMARY, tmp_path) == without


def test_gradients_that_nothing_holds_are_not_copied() -> None:
    found = counted(CPU, 2, lambda text: None)
    assert [of["clones"] for of in found] == [0, 0]
    assert found[1]["load"] == THREADS
    assert all(of["gradients"] == 2 * clones.T * 2 * clones.LAYERS for of in found)


def test_gradients_that_something_holds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook holds the gradients of two parameters, as a thread of autograd's would."""
    problem, held = clones._problem, []

    def with_hooks(device: torch.device) -> Any:
        model, losses = problem(device)
        for p in list(model.parameters())[:2]:
            p.register_hook(held.append)
        return model, losses

    monkeypatch.setattr(clones, "_problem", with_hooks)
    assert clones._clones(CPU, 3, behind=False) == 3 * clones.T * 2
    assert aliasing._is_aliased.__module__ == aliasing.__name__  # as it was


def test_kernels_are_compiled_beside_each_other_on_short_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "WORKERS", 1)
    long, unknown = Case("gramian", 3, 10**13), Case("nothing", 3, 10**13)
    measured._compile([long, replace(long, P=10**12), unknown], CPU)
    assert capsys.readouterr().out == f"{replace(unknown, P=measured.SMALL)}: KeyError: 'nothing'\n"
