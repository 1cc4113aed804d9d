"""Tests of ``python -m bench methods``: every row is measured beside TorchJD's method, saved and shown."""

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.methods import command
from bench.methods.contestants import (
    COPY,
    OURS,
    P_OF_GRAMIANS,
    THEIRS,
    Calls,
    of_aggregation,
    of_weights,
    rows,
)
from bench.methods.table import table
from gradkern.aggregators.methods import METHODS
from gradkern.ops import gramian

FIGURES = {"p20": 1e-5, "p50": 2e-5, "p80": 3e-5}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TASKS", (2, 3))
    monkeypatch.setattr(command, "SHAPE", (3, 500))


@pytest.mark.usefixtures("small")
def test_every_row_is_measured_saved_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--seconds", "0.001", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "methods.json").read_text())
    for key, sizes in (("rows", (2, 3)), ("whole", (3,))):
        measured = {(row["method"], row["T"]) for row in results[key]}
        left_out = {(s["method"], s["T"]) for s in results["skipped"] if s["what"] == key}
        assert measured | left_out == {(m.name, T) for m in METHODS.values() for T in sizes}
        for row in results[key]:
            assert row["seconds"][OURS]["p50"] > 0
            assert set(row["ratios"]) == set(row["seconds"]) - {OURS}
    assert all(COPY in row["ratios"] for row in results["whole"])
    skipped = {(s["method"], s["what"], s["T"]) for s in results["skipped"]}
    need_entries = ("gradattention", "graddrop", "trimmed-mean")
    assert skipped == {("krum", "rows", 2)} | {(name, "rows", T) for name in need_entries for T in (2, 3)}
    main(["methods", "--show", str(tmp_path / "methods.json")])
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.usefixtures("small")
def test_some_methods_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--method", "MGDA", "pcgrad_random", "--seconds", "0.001", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "methods.json").read_text())
    assert [row["method"] for row in results["whole"]] == ["mgda", "pcgrad-random"]
    with pytest.raises(SystemExit):
        main(["methods", "--method", "mgdb"])
    assert "the closest is 'mgda'" in capsys.readouterr().err


def same(calls: Calls) -> None:
    ours, theirs = calls[OURS](), calls[THEIRS]()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    # TorchJD's SDMGrad adds 1e-8 to a divisor, before 20 iterations at a rate of 10, and its updates are float32.
    torch.testing.assert_close(ours, theirs, check_dtype=False, rtol=1e-4, atol=1e-5)


def test_the_weights_of_config_are_measured_beside_its_whole_aggregation() -> None:
    """TorchJD's ConFIG has a weighting, that of the preference: fewer operations than any weights of the method."""
    pytest.importorskip("torchjd")
    torch.manual_seed(0)
    calls = of_weights(METHODS["config"], 3)
    torch.manual_seed(0)
    M = gramian(rows(3, P_OF_GRAMIANS, torch.float64))
    w, update = calls[OURS](), calls[THEIRS]()
    assert isinstance(w, torch.Tensor)
    torch.testing.assert_close(w @ torch.linalg.cholesky(M), update)


def test_arguments_for_a_number_of_tasks_are_made_to_fit() -> None:
    w = of_weights(METHODS["constant"], 8)[OURS]()
    assert isinstance(w, torch.Tensor)
    assert w.tolist() == [1.0, 2.32, 1.61, 1.0, 2.32, 1.61, 1.0, 2.32]
    famo = of_weights(METHODS["famo"], 8)[OURS]()
    assert isinstance(famo, torch.Tensor)
    assert famo.shape == (8,)


def test_the_contestants_do_the_same_work() -> None:
    """Where no order is drawn and TorchJD's is exact: equal weights and updates. Elsewhere the names tell."""
    pytest.importorskip("torchjd")
    for name in ("sum", "mean", "constant", "modo", "sdmgrad"):
        for calls in (of_weights(METHODS[name], 3), of_aggregation(METHODS[name], 3, 50)):
            same(calls)
    same(of_aggregation(METHODS["trimmed-mean"], 4, 50))
    torch.manual_seed(0)
    drawn = of_weights(METHODS["rgw"], 3)[THEIRS]()
    assert isinstance(drawn, torch.Tensor)
    assert drawn.sum().item() == pytest.approx(1)
    assert THEIRS in of_weights(METHODS["pcgrad"], 3)
    # TorchJD has one kind of partner.
    assert set(of_weights(METHODS["pcgrad-random"], 3)) == {OURS}
    assert set(of_aggregation(METHODS["pcgrad-random"], 3, 50)) == {OURS, COPY}


def test_a_missing_library_leaves_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torchjd.aggregation")

    def missing(*args: object) -> None:
        raise ImportError("quadprog")

    monkeypatch.setattr(theirs.MGDAWeighting, "__init__", missing)
    calls = of_weights(METHODS["mgda"], 3)
    assert isinstance(calls[OURS](), torch.Tensor)
    with pytest.raises(ImportError, match="quadprog"):
        calls[THEIRS]()


def test_the_tables_say_what_they_show() -> None:
    row = {"method": "mgda", "words": "2T + 1", "T": 3, "seconds": {OURS: FIGURES, THEIRS: FIGURES}, "absent": {}}
    row |= {"ratios": {THEIRS: {"p20": 1.0, "p50": 5.0, "p80": 9.0}}}
    whole = row | {"P": 500, "ratios": {COPY: {"p50": 0.25}}, "absent": {THEIRS: "ImportError: none"}}
    results = {
        "machine": {"model": "a CPU", "threads": 2},
        "versions": {"python": "3.14", "torch": "9.9"},
        "peers": {THEIRS: "0.18.0"},
        "tasks": [2, 3],
        "shape": [3, 500],
        "rows": [row],
        "whole": [whole],
        "skipped": [{"method": "krum", "T": T, "what": "rows", "why": "ValueError: few"} for T in (2, 3)],
    }
    lines = table(results).splitlines()
    assert lines[0] == "a CPU, threads: 2, Python 3.14, torch 9.9, TorchJD 0.18.0"
    assert "| mgda | 2T + 1 | - | 20 (5 ×) |" in lines
    assert "| mgda | 2T + 1 | 0.02 | 0.25 | - |" in lines
    assert "- Left out: gradkern's krum, T = 2, 3, weights: ValueError: few" in lines
    assert "- Left out: TorchJD's mgda, T = 3, aggregation: ImportError: none" in lines
