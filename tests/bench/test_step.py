"""``python -m bench.step``: every contestant takes the right step, and the reported figures are the measured ones."""

import json
import math
from functools import partial
from itertools import count, permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import device as machine
from bench import measure
from bench.peers import PYTORCH_OPTIMIZER, TORCHJD, Peers, installed_peers
from bench.shapes import BERT_BASE, bert, numbers
from bench.step.__main__ import main
from bench.step.captured import Captured
from bench.step.contestants import BASELINE, LR, contestants
from bench.step.model import OUTPUTS, SIZES, MultiTask, Size
from bench.step.parts import PARTS, parts
from bench.step.table import table
from examples.minbert.bert import Bert, Config
from gradkern import reference
from gradkern.tuning import clock
from tests.models import flat, task_gradients

TINY = Config(layers=2, hidden=32, heads=4, inner=64, vocabulary=50, positions=64)
CPU = torch.device("cpu")
T = len(OUTPUTS)
INSTALLED = installed_peers()
NAMES = list(contestants(MultiTask(TINY), INSTALLED))
ORDERS = list(product(permutations((1, 2)), permutations((0, 2)), permutations((0, 1))))

# Relative to the learning rate, which is about how far AdamW moves a parameter. Gradients round at 1e-17, and Adam
# divides by as little as 1e-8.
NEAR = 1e-6


@pytest.fixture
def model(float64_by_default: None) -> MultiTask:
    """A model with a seed at which all pairs of tasks conflict."""
    torch.manual_seed(53)
    return MultiTask(TINY)


class Naive:
    """AdamW (Loshchilov & Hutter 2019, torch's defaults) on one vector."""

    def __init__(self, theta: Tensor) -> None:
        self.theta, self.m, self.v, self.t = theta, torch.zeros_like(theta), torch.zeros_like(theta), 0

    def after(self, g: Tensor) -> "Naive":
        """Return the state one step later."""
        after = Naive(self.theta * (1 - LR * 0.01))
        after.t, after.m, after.v = self.t + 1, 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        after.theta -= LR * after.m / (1 - 0.9**after.t) / ((after.v / (1 - 0.999**after.t)).sqrt() + 1e-8)
        return after


def updates(name: str, step: int, model: MultiTask) -> list[Tensor]:
    """Return the gradients that the contestant may give to AdamW, heads included; one for each choice of orders."""
    params, trunk = list(model.parameters()), sum(p.numel() for p in model.encoder.parameters())
    rows = [flat(row, params) for row in task_gradients(model().losses, params)]
    if name == PYTORCH_OPTIMIZER:  # it treats heads as if all tasks shared them
        return [torch.stack(reference.pcgrad(rows, order)).sum(0) for order in ORDERS]
    shared, heads = [row[:trunk] for row in rows], torch.stack(rows).sum(0)[trunk:]
    if name == BASELINE or "Sum" in name:
        found = [torch.stack(shared).sum(0)]
    elif "GradAttention" in name:
        found = [torch.stack(shared).mean(0)]  # at the first step
    elif "suppressed" in name:
        block, scope = (128, "all") if "blocks" in name else (1, "update")
        numels = [p.numel() for p in params]
        firsts = reference.first_units(numels, block)
        keeps = [reference.kept(0, step, 0.45, block, u, n) for u, n in zip(firsts, numels, strict=True)]
        keep = torch.cat(keeps)[:trunk]
        found = [reference.suppressed(shared, keep, scope, partial(reference.pcgrad, order=order)) for order in ORDERS]
    elif "GradVac" in name:  # at the first step its targets are 0, so it does PCGrad on each parameter
        pieces = [row.split([p.numel() for p in model.encoder.parameters()]) for row in shared]
        columns = list(zip(*pieces, strict=True))
        found = [torch.cat([torch.stack(reference.pcgrad(c, order)).sum(0) for c in columns]) for order in ORDERS]
    else:
        found = [torch.stack(reference.pcgrad(shared, order)).sum(0) for order in ORDERS]
    return [torch.cat((g, heads)) for g in found]


def groups(name: str, model: MultiTask) -> list[int]:
    """Return the sizes of the groups that draw their own orders."""
    params = [p.numel() for p in model.parameters()]
    return params if "GradVac" in name else [sum(params)]


def theta(model: MultiTask) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_reference(name: str, model: MultiTask) -> None:
    step = contestants(model, INSTALLED)[name]
    naive = Naive(theta(model))
    for k in range(1 if "GradVac" in name or "GradAttention" in name else 3):
        candidates = updates(name, k, model)
        step()
        assert all(p.grad is None for p in model.parameters())
        sizes, chosen = groups(name, model), []
        ends = [naive.after(g).theta.split(sizes) for g in candidates]
        for n, now in enumerate(theta(model).split(sizes)):
            errors = [float((end[n] - now).abs().max()) for end in ends]
            assert min(errors) <= NEAR * LR
            chosen.append(candidates[errors.index(min(errors))].split(sizes)[n])
        naive = naive.after(torch.cat(chosen))


def test_the_tasks_conflict(model: MultiTask) -> None:
    """The tasks conflict so much that the order of projections and the choice of method change AdamW's step."""
    naive = Naive(theta(model))
    pcgrad = [naive.after(g).theta for g in updates("PCGrad", 0, model)]
    for other in ("Sum", "GradAttention", "GradVac", "suppressed", "suppressed in blocks", PYTORCH_OPTIMIZER):
        ends = [naive.after(g).theta for g in updates(other, 0, model)]
        assert min(float((a - b).abs().max()) for a in pcgrad for b in ends) > 1e5 * NEAR * LR
    assert max(float((a - b).abs().max()) for a in pcgrad for b in pcgrad) > 1e5 * NEAR * LR


def test_all_contestants_step_the_same_parameters(model: MultiTask) -> None:
    """Contestants that step in turn, as when measured, each move every parameter."""
    for step in contestants(model, INSTALLED).values():
        before = [p.detach().clone() for p in model.parameters()]
        step()
        assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


def test_encoders_are_those_of_the_papers() -> None:
    def shapes(size: Size) -> list[tuple[int, ...]]:
        with torch.device("meta"):
            return [tuple(p.shape) for p in Bert(size.config, dropout=0.0).parameters()]

    assert shapes(SIZES["bert-base"]) == BERT_BASE
    assert shapes(SIZES["minilm"]) == bert(30522, 512, 384, 6, 1536)
    assert numbers(shapes(SIZES["minilm"])) == 22_713_216  # "22.7M" in the released weights


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_split_by_the_code_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by 1 at each reading: twice for each watched call, and at the start and the end."""
    step = contestants(MultiTask(TINY), INSTALLED)[name]
    step()
    ticks = count()
    for module in (machine, clock):  # parts ask one, whole steps the other
        monkeypatch.setattr(module, "now", lambda device: next(ticks))
    functions = torch.autograd.grad, torch.autograd.backward, torch.optim.AdamW.step, MultiTask.forward
    found = parts(step, CPU)
    one_pass = name == BASELINE or "Sum" in name
    backward = 1 if one_pass else 2 * T if name == TORCHJD else T  # TorchJD: heads, then encoder
    network = 2 if "GradAttention" in name else 0  # weights() and the code after it; its own backward pass is surgery
    surgery = 1 + backward + 1 + 1 + network
    assert found == {"forward": 1, "backward": backward, "update": 1, "surgery": surgery}
    assert functions == (torch.autograd.grad, torch.autograd.backward, torch.optim.AdamW.step, MultiTask.forward)


@pytest.mark.parametrize("peers", [False, True])
def test_a_run_prints_and_saves_its_measurements(
    peers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size("tiny", TINY))
    monkeypatch.setattr(measure, "SLOW", math.inf)  # on a busy machine even a tiny step may count as slow
    main(["--size", "tiny", "--seconds", "0.01", "--out", str(tmp_path / "new"), *(["--peers"] if peers else [])])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "step.json").read_text())
    assert results["P"] == sum(p.numel() for p in MultiTask(TINY).parameters())
    among = INSTALLED if peers else Peers()
    names = contestants(MultiTask(TINY), among)
    rows = {row["contestant"]: row for row in results["rows"]}
    assert list(rows) == list(names)
    assert {s["contestant"]: s["why"] for s in results["skipped"]} == among.missing
    text = table(results)
    assert all(f"| {name} | " in text for name in names)
    assert all(name in text and why in text for name, why in among.missing.items())
    assert text in printed
    base = rows[BASELINE]
    assert base["ratio"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    for name, row in rows.items():
        assert f"first calls of {name}\n" in printed
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert row["rounds"] == 3
        assert row["parts"].keys() == set(PARTS)
        assert all(row["parts"][part]["p50"] > 0 for part in PARTS)
        assert row["over"] == row["peak"] - base["peak"]
        assert row["over in rows"] == row["over"] / 4 / results["P"]

    main(["--show", str(tmp_path / "new" / "step.json")])
    assert capsys.readouterr().out == f"{text}\n"


def test_the_table_by_hand() -> None:
    def figures(p50: float) -> dict[str, float]:
        return {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}

    def row(name: str, over: int, **captured: Any) -> dict[str, Any]:
        times = {part: figures(t) for part, t in zip(PARTS, (0.1, 0.2, 0.0123, 0.4), strict=True)}
        whole = {"contestant": name, "seconds": figures(0.7123), "ratio": figures(1.5), "parts": times}
        return whole | {"over": over, "over in rows": over / 4e6} | captured

    graph = {"seconds": figures(0.5), "ratio": figures(2.0)}
    results = {
        "size": "tiny",
        "P": 1_000_000,
        "machine": {"device": "cuda:0", "model": "a GPU", "threads": 2},
        "versions": {"torch": "9.9"},
        "peers": {"TorchJD": "8.8"},
        "rows": [row("one", 6_000_000, captured=graph), row("other", -2_000_000)],
        "skipped": [{"contestant": "other", "what": "CUDA graph", "why": "it asks the host"}],
    }
    lines = table(results).splitlines()
    assert lines[0] == "tiny, P = 1,000,000, three tasks of 8 × 64 tokens, float32: a GPU, torch 9.9, TorchJD 8.8"
    assert lines[4:6] == [
        "| one | 712 | 1.50 (1.35–1.65) | 100 | 200 | 12.3 | 400 | +6 MB | +1.50 | 500 | 2.00 (1.80–2.20) |",
        "| other | 712 | 1.50 (1.35–1.65) | 100 | 200 | 12.3 | 400 | -2 MB | -0.50 | – | – |",
    ]
    assert {line.count("|") for line in lines[2:6]} == {12}
    assert lines[-1] == "- Left out, CUDA graph: other (it asks the host)"
    for one in results["rows"]:
        one.pop("captured", None)
    assert {line.count("|") for line in table(results).splitlines()[2:6]} == {10}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", contestants(MultiTask(TINY), Peers()))
def test_a_captured_step_is_a_step(name: str) -> None:
    """Each replay moves the parameters as far as a step does, and to the same values if no step draws numbers."""
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = MultiTask(TINY)
        step = contestants(model, Peers())[name]
        step()
        replay = Captured(step) if captured else step
        replay()
        if not captured:
            replay()  # a capture runs the step once more before it
        before = theta(model)
        replay()
        assert 0.1 * LR < float((theta(model) - before).abs().max()) < 10 * LR
        ends.append(theta(model))
    if name == BASELINE or "Sum" in name:
        assert float((ends[0] - ends[1]).abs().max()) <= NEAR * LR
