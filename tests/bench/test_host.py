"""``python -m bench host``: contestants take the right step, and stages are told apart by the code that runs."""

import importlib.util
import json
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.host import command, nets, rounds, run, stages
from bench.host.nets import GRADVAC, OURS, PASSES, PER_PARAMETER, UPDATE, USUAL, USUAL_UPDATE, Net
from bench.host.prepared import Prepared, T, shapes
from bench.host.rounds import FEWEST, WARM_UP, interleaved
from bench.host.run import PYTORCH, STAND_IN
from bench.host.stages import ADAMW, REST, STAGES, STEP
from bench.host.table import table
from bench.peers import TORCHJD, Peers, installed_peers
from bench.shapes import BERT_BASE
from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.layout import Tables
from gradkern.ops.triton import address_tables
from gradkern.step import flat_rows
from tests.models import flat, task_gradients

TINY = Net(3, 2, 4)
TENSORS = (2, 5)
INSTALLED = installed_peers()
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ORDERS = list(product(permutations((1, 2)), permutations((0, 2)), permutations((0, 1))))

# Of gradients of about 1, or relative to the learning rate, which is about how far AdamW moves a parameter. In float64
# gradients round at 1e-17, and Adam divides by as little as 1e-8. TorchJD adds up to 1e-8 to each product of norms.
NEAR = 1e-6


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command measure little."""
    monkeypatch.setattr(command, "NETS", (TINY,))
    monkeypatch.setattr(command, "TENSORS", TENSORS)


@NEEDS_TRITON
@pytest.mark.usefixtures("few")
def test_the_command_measures_saves_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (Tables._once, address_tables._table, dict(operators.combine_tensors.implementations), sys.getprofile())
    main(["host", "--seconds", "0.01", "--out", str(tmp_path / "new")])
    after = (Tables._once, address_tables._table, dict(operators.combine_tensors.implementations), sys.getprofile())
    assert after == before
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "host.json").read_text())
    assert results["skipped"] == []
    assert results["machine"]["threads"] == torch.get_num_threads()
    (row,) = results["rows"]
    params = list(TINY.make().parameters())
    assert (row["T"], row["tensors"], row["numbers"]) == (3, 4, sum(p.numel() for p in params))
    assert row["rounds"] >= FEWEST
    assert set(row["seconds"]) == set(nets.contestants(params, INSTALLED))
    assert set(results["stages"]) == {PYTORCH, STAND_IN}
    for back_end, of_sizes in results["stages"].items():
        assert [of_size["tensors"] for of_size in of_sizes] == list(TENSORS)
        for of_size in of_sizes:
            assert of_size["calls"].keys() == of_size["seconds"].keys() == {*STAGES, STEP, ADAMW}
            assert all(of_size["seconds"][part]["p50"] > 0 for part in (STEP, ADAMW, *STAGES))
            # Gramian, its reduction, PCGrad's program, combination; and AdamW in one launch
            assert of_size.get("launches") == ({STEP: 4, ADAMW: 1} if back_end == STAND_IN else None)
    text = table(results)
    assert text in printed
    main(["host", "--show", str(tmp_path / "new" / "host.json")])
    assert capsys.readouterr().out == f"{text}\n"


def test_without_triton_the_stand_in_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    results: dict[str, Any] = {"rows": [], "skipped": []}
    run.run((), (2,), Peers(), 0.01, results, lambda line: None)
    assert set(results["stages"]) == {PYTORCH}
    assert results["skipped"] == [{"what": STAND_IN, "why": "Triton is not installed"}]


@NEEDS_TRITON
def test_what_ends_the_stand_in_is_the_reason() -> None:
    with pytest.raises(RuntimeError, match="invalid int value: 'many'"):
        run.stand_in(("many",), 0.01)  # type: ignore[arg-type]


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", nets.contestants(list(TINY.make().parameters()), INSTALLED))
def test_contestants_take_the_right_step(name: str) -> None:
    model = TINY.make()
    params, x, labels = list(model.parameters()), torch.randn(7, 2), torch.randn(3, 7, 1)

    def losses() -> list[Tensor]:
        o = model(x)
        return [(o - y).pow(2).mean() for y in labels]

    grads = task_gradients(losses(), params)
    groups = [[k] for k in range(len(params))] if name == PER_PARAMETER else [range(len(params))]
    before = flat(params, params).detach().clone()
    found = nets.contestants(params, INSTALLED)[name](losses())
    if name == PASSES:
        for given, expected in zip(found, grads, strict=True):
            torch.testing.assert_close(given, tuple(expected))
        return
    for members in groups:
        rows = [torch.cat([row[k].flatten() for k in members]) for row in grads]
        expected = [torch.stack(reference.pcgrad(rows, order)).sum(0) for order in ORDERS]
        if name in (UPDATE, USUAL_UPDATE):
            at_first = [g / (g.abs() + 1e-8) for g in expected]  # AdamW's first step, its corrections of bias cancelled
            expected = [before * (1 - 0.01 * nets.LR) - nets.LR * step for step in at_first]
            got, scale = flat(params, params), nets.LR
        else:
            got, scale = torch.cat([params[k].grad.flatten() for k in members]), 1.0
        assert min(float((got - one).abs().max()) for one in expected) <= NEAR * scale


def test_rounds_rotate_and_the_first_ones_do_not_count() -> None:
    called: list[str] = []
    given = iter(range(1000))
    contestants = {name: lambda x, name=name: called.append((name, x)) for name in "abc"}
    found = interleaved(contestants, lambda: next(given), 0.0)
    assert [x for _, x in called] == list(range(3 * (WARM_UP + FEWEST)))
    assert "".join(name for name, _ in called[:12]) == "abcbcacababc"
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", FEWEST)
    assert list(rounds.rounds(0.0)) == [False] * WARM_UP + [True] * FEWEST


@pytest.mark.parametrize("n", [2, 5])
def test_calls_of_the_stages_add_up_to_those_of_the_step(n: int) -> None:
    prepared = Prepared(shapes(n))
    for _ in range(2):  # a first step fills caches
        prepared.renew()
        prepared.step()
    prepared.renew()
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    prepared.step()
    sys.setprofile(None)
    prepared.renew()
    found = stages.calls_by_stage(prepared.step)
    assert sum(found.values()) == events.count("call")
    assert found.keys() == set(STAGES)
    assert min(found.values()) > 0


def test_a_call_belongs_to_the_outermost_watched_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        @staticmethod
        def inner() -> None:
            leaf()

        @staticmethod
        def outer() -> None:
            Owner.inner()
            leaf()

    def leaf() -> None:
        pass

    def step() -> None:
        leaf()
        Owner.outer()
        leaf()
        Owner.inner()

    monkeypatch.setattr(stages, "WATCHED", (("surgery", Owner, "outer"), ("info", Owner, "inner")))
    assert stages.calls_by_stage(step) == dict.fromkeys(STAGES, 0) | {"surgery": 4, "info": 2, REST: 3}


@pytest.mark.parametrize("largest", [0, flat_rows.LARGEST], ids=["tensors", "a matrix"])
def test_a_prepared_step_is_that_of_the_gradients(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is in the second step too, although the first one may overwrite its gradients."""
    monkeypatch.setattr(flat_rows, "LARGEST", largest)
    prepared = Prepared(shapes(3))
    originals = [[g.clone() for g in row] for row in prepared.source._originals]
    for _ in range(2):
        prepared.renew()
        prepared.step()
        rows = [torch.cat([g.flatten() for g in row]) for row in originals]
        expected = [torch.stack(reference.pcgrad(rows, order)).sum(0) for order in ORDERS]
        got = torch.cat([p.grad.flatten() for p in prepared.params])
        # Sums of 3 float32 numbers of some units, each of which rounds at 6e-8 of itself.
        assert min(float((got - one).abs().max()) for one in expected) < 1e-5
    assert len(originals) == T


def test_shapes() -> None:
    assert shapes(3) == [(48, 48), (48,), (48, 48)]
    cut = shapes(199)
    assert len(cut) == len(BERT_BASE)
    assert cut[0] == (64, 64)
    assert cut[2] == (2, 64)
    assert max(max(shape) for shape in cut) == 64


def test_the_tables_by_hand() -> None:
    def figures(p50: float) -> dict[str, float]:
        return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}

    names = {PASSES: 1, USUAL: 2, OURS: 3, GRADVAC: 4, PER_PARAMETER: 5, UPDATE: 6, USUAL_UPDATE: 7}
    row = {
        "T": 3,
        "tensors": 16,
        "numbers": 15501,
        "seconds": {name: figures(1e-4 * k) for name, k in names.items()},
        "of PCGrad": {name: figures(k) for name, k in names.items()},
        "of update": {USUAL_UPDATE: figures(1.5)},
        "beyond the passes": {name: figures(1e-5 * k) for name, k in names.items()},
    }
    parts = {part: k + 1 for k, part in enumerate((*STAGES, STEP, ADAMW))}
    stage = {
        "tensors": 4,
        "seconds": {part: figures(1e-6 * k) for part, k in parts.items()},
        "calls": {part: 1000 * k for part, k in parts.items()},
        "launches": {STEP: 4, ADAMW: 1},
    }
    results = {
        "machine": {"model": "a CPU", "threads": 2},
        "versions": {"python": "3.14", "torch": "9.9"},
        "peers": {},
        "missing": {TORCHJD: "ImportError: none"},
        "rows": [row],
        "stages": {PYTORCH: [stage], STAND_IN: [stage, stage]},
        "skipped": [],
    }
    lines = table(results).splitlines()
    assert lines[0] == "a CPU, threads: 2, Python 3.14, torch 9.9"
    assert "| 3 | 16 | 15,501 | 100 | 2.00 | – | 30 | 20 | 4.00 | 5.00 | 1.50 | 60 |" in lines
    assert "| surgery | 3 | 3,000 |" in lines
    assert "| surgery | 3 | 3,000 | 3 | 3,000 |" in lines
    assert "| whole step, calls per tensor |  | 2,000 |" in lines
    assert "| AdamW.step, launches of kernels |  | 1 |  | 1 |" in lines
    assert "| AdamW.step, launches of kernels |  | 1 |" not in lines
    assert lines[-1] == "- Left out: TorchJD (ImportError: none)"
