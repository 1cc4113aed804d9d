"""``python -m bench.step --shared``: every way takes the right step, and the reported figures are the measured ones."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.peers import TORCHJD, Peers, installed_peers
from bench.step.__main__ import main
from bench.step.shared import run
from bench.step.shared.models import MODELS, Named, Shared, encoder, mlp, resnet
from bench.step.shared.table import table
from bench.step.shared.ways import PLAIN, ROWS, Way, ways
from examples.minbert.bert import Config
from gradkern import reference
from tests.models import flat, task_gradients

T = 3
TINY = Config(hidden=12, heads=2, inner=24, vocabulary=40, positions=64)
SMALL = {
    "mlp": Named("small MLP", partial(mlp, width=20, layers=2, batch=8)),
    "encoder": Named("small encoder", partial(encoder, config=TINY, layers=1)),
    "resnet": Named("small ResNet", partial(resnet, width=2, side=32, batch=4)),
}
INSTALLED = installed_peers()
NAMES = list(ways(SMALL["mlp"].make(2), INSTALLED))
APPROXIMATE = [name for name in NAMES if "Sketch" in name or name.startswith("features") or "rep_grad=True" in name]


def made(name: str) -> Shared:
    """Return a small model with a seed at which tasks of opposite targets conflict."""
    torch.manual_seed(0)
    return SMALL[name].make(T)


def trunk_rows(model: Shared) -> list[Tensor]:
    """Return the task gradients of the trunk."""
    params = list(model.trunk.parameters())
    return [flat(row, params) for row in task_gradients(model().losses, params)]


def upgrad(rows: list[Tensor]) -> Tensor:
    return reference.upgrad(rows, [1.0] * T)


def by_feature_gradients(model: Shared, per_example: bool) -> Tensor:
    """Return the trunk's update with the weights of UPGrad on the gradients by the features."""
    h, losses = model()
    found = [torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in losses]
    H = [g.flatten() if per_example else g.sum(0) for g in found]
    w = torch.linalg.lstsq(torch.stack(H, 1), upgrad(H)[:, None]).solution[:, 0]
    return w @ torch.stack(trunk_rows(model))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("of", SMALL)
@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_the_reference(name: str, of: str) -> None:
    model = made(of)
    J = torch.stack(trunk_rows(model))
    way = ways(model, INSTALLED)[name]
    way.backward()
    update = flat([p.grad for p in way.model.trunk.parameters()], list(way.model.trunk.parameters()))
    right = upgrad(list(J))
    if name == PLAIN:
        right = J.sum(0)
    elif "Sketch" in name:  # its weights are random; the update is still one of the gradients with such weights
        right = J.T @ torch.linalg.lstsq(J.T, update[:, None]).solution[:, 0]
    elif name in APPROXIMATE:
        right = by_feature_gradients(model, "per example" in name)
    # TorchJD adds 1e-4 to the diagonal of a Gramian of trace 1; all else rounds.
    assert float((update - right).norm() / right.norm()) <= (1e-2 if TORCHJD in name else 1e-8)
    if name != f"{TORCHJD} autogram":  # its heads are weighted too
        for p, head in zip(way.model.heads.parameters(), plain_heads(model), strict=True):
            torch.testing.assert_close(p.grad, head)


def plain_heads(model: Shared) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(model().losses, torch.zeros(())), list(model.heads.parameters()))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("of", SMALL)
def test_surgery_changes_the_update(of: str) -> None:
    """The tasks conflict, so that no way can pass for another; features differ from parameters, too."""
    model = made(of)
    J = torch.stack(trunk_rows(model))
    M = J @ J.T
    assert float(M[0, 1]) < 0
    assert float(M[1, 2]) < 0
    right = upgrad(list(J))
    for other in (J.sum(0), by_feature_gradients(model, True), by_feature_gradients(model, False)):
        assert float((other - right).norm() / right.norm()) > 1e-3


def test_a_way_leaves_no_gradients() -> None:
    model = made("mlp")
    for way in ways(model, INSTALLED).values():
        way()
        assert all(p.grad is None for p in way.model.parameters())


def test_models_have_their_sizes() -> None:
    with torch.device("meta"):
        trunks = {name: sum(p.numel() for p in MODELS[name].make(2).trunk.parameters()) for name in MODELS}
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 384 + 1536 + 4 * 384
    embeddings = (30522 + 512 + 2) * 384  # the last two are those of the normalisation
    # torchvision's resnet18 has 11,689,512 with a last layer of 1000 × 512 + 1000.
    expected = {"mlp": 4 * (1024 * 1024 + 1024), "encoder": 3 * layer + embeddings, "resnet": 11_689_512 - 513_000}
    assert trunks == expected


def test_errors_are_relative_to_the_update_and_to_what_surgery_changes() -> None:
    model = made("mlp")
    taken = ways(model, Peers())

    def longer() -> None:
        taken[ROWS].backward()
        for p in model.trunk.parameters():
            assert p.grad is not None
            p.grad *= 1.25

    found = run._errors(model, {PLAIN: taken[PLAIN], "longer": Way(model, longer)})
    assert found[PLAIN]["lost"] == pytest.approx(1, rel=1e-5)  # of float32
    assert found["longer"]["error"] == pytest.approx(0.25, rel=1e-5)
    assert found["longer"]["lost"] == pytest.approx(0.25 / found[PLAIN]["error"], rel=1e-5)


@pytest.mark.parametrize("peers", [False, True])
def test_a_run_prints_and_saves_its_measurements(
    peers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, small in SMALL.items():
        monkeypatch.setitem(MODELS, name, small)
    monkeypatch.setattr(measure, "SLOW", math.inf)  # on a busy machine even a tiny step may count as slow
    monkeypatch.setattr(run, "TOO_LONG", {("encoder", 2), ("encoder", 3)})
    arguments = ["--shared", "--model", "mlp", "encoder", "--tasks", "2", "3", "--seconds", "0.01"]
    main([*arguments, "--out", str(tmp_path), *(["--peers"] if peers else [])])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "shared.json").read_text())
    among = INSTALLED if peers else Peers()
    names = list(ways(SMALL["mlp"].make(2), among))
    rows = {(row["model"], row["T"], row["way"]): row for row in results["rows"]}
    assert list(rows) == [("mlp", tasks, name) for tasks in (2, 3) for name in names]
    skipped = [{"way": name, "why": why} for name, why in among.missing.items() if name == TORCHJD]
    left_out = {"model": "encoder", "way": "all", "why": "they would take minutes"}
    assert results["skipped"] == [*skipped, *(left_out | {"T": tasks} for tasks in (2, 3))]
    for (name, tasks, way), row in rows.items():
        plain = rows[name, tasks, PLAIN]
        assert row["P"] == sum(p.numel() for p in SMALL[name].make(tasks).parameters())
        assert row["rounds"] == 3
        for clock in ("seconds", "processor"):
            assert 0 < row[clock]["p20"] <= row[clock]["p50"] <= row[clock]["p80"]
            assert row[f"{clock} over plain"]["p50"] > 0
            assert plain[f"{clock} over plain"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
        assert row["peak in P"] == row["peak"] / 4 / row["P"] > 0
        assert row["exact"] == (way not in APPROXIMATE)
        # Float32 rounds, TorchJD adds 1e-4 to a diagonal, and features are another method.
        limit = 0.01 if row["exact"] and way != PLAIN else math.inf
        assert row["error"] < limit
    text = table(results)
    assert all(f"| {name} | " in text for name in names)
    assert "- Left out: encoder, T = 3: all (they would take minutes)" in text
    assert text in printed
    main(["--show", str(tmp_path / "shared.json")])
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("tasks", ["1", "many"])
def test_surgery_needs_two_tasks(tasks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shared", "--tasks", "2", tasks])
    assert tasks in capsys.readouterr().err.splitlines()[-1]


def test_the_table_by_hand() -> None:
    def row(way: str, tasks: int, times: tuple[float, float, float], **more: Any) -> dict[str, Any]:
        ratio = dict(zip(("p20", "p50", "p80"), times, strict=True))
        figures = {"model": "mlp", "T": tasks, "P": 4_210_000, "way": way, "rounds": 3, "exact": True, "error": 3.2e-7}
        figures |= {"processor over plain": ratio, "seconds over plain": {"p50": 9.876}, "peak in P": 1.234}
        return figures | more

    results = {
        "machine": {"device": "cpu", "model": "a CPU", "threads": 2},
        "versions": {"torch": "9.9"},
        "peers": {"TorchJD": "8.8"},
        "rows": [
            row("plain", 2, (1.0, 1.0, 1.0)),
            row("rows", 2, (1.9, 2.0, 2.1)),
            row("plain", 40, (1.0, 1.0, 1.0)),
            row("a sketch", 40, (12.0, 12.0, 12.0), rounds=1, exact=False, lost=0.0345),
        ],
        "skipped": [
            {"way": "LibMTL", "why": "it is not there"},
            {"model": "mlp", "T": 40, "way": "rows", "why": "too little memory"},
        ],
    }
    blocks = table(results).split("\n\n")
    assert blocks[0] == "a CPU, threads: 2, torch 9.9, TorchJD 8.8"
    lines = blocks[1].splitlines()
    assert lines[0].startswith("| MLP, 4 × 1024², 128 examples, P = 4.2M; T = 2 / 40 | processor | ")
    assert lines[3:] == [
        "| rows | 2.00 / – | 1.90–2.10 / – | 9.88 / – | 1.23 / – | 3e-07 / – |",
        "| a sketch | – / 12.00 | – / – | – / 9.88 | – / 1.23 | – / 3.45 % |",
    ]
    assert {line.count("|") for line in lines} == {7}
    assert blocks[-1].splitlines() == [
        "- Left out: LibMTL (it is not there)",
        "- Left out: mlp, T = 40: rows (too little memory)",
    ]
