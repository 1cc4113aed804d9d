"""``python -m bench``: all contestants do the same work, and the reported figures are the measured ones."""

import csv
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench import cases, floors, measure, peers, run
from bench.__main__ import main
from bench.cases import Case
from bench.contestants import ONE_LAUNCH, OPERATIONS, OURS, OUT, _one_launch, contestants
from bench.inputs import Inputs
from bench.memory import peak
from bench.peers import PACKAGES, Peers
from bench.report import summary
from bench.shapes import BERT_BASE, numbers
from gradkern import reference
from gradkern.aggregators.methods import METHODS
from gradkern.kernels.served import one_launch, served
from gradkern.ops import processor

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"
INSTALLED = Peers({name: "?" for name, package in PACKAGES.items() if importlib.util.find_spec(package)})
ORDERS = list(product(permutations((1, 2)), permutations((0, 2)), permutations((0, 1))))

# Relative to the longest row: float32 sums of some thousand numbers, and the 1e-8 that TorchJD adds to each product of
# norms.
NEAR = 1e-5


def opposed(T: int, P: int) -> Tensor:
    """Return rows that conflict pairwise, so that every order of projections has a different result."""
    J = torch.randn(T, P)
    return J - 0.9 * J.mean(0)


def inputs(case: Case) -> Inputs:
    """Return the inputs of a case, with opposed rows."""
    x = Inputs(case, CPU)
    rows = opposed(case.T, case.P or 64)
    x.J = rows
    x.M = (rows @ rows.T).repeat(case.S, 1, 1)
    x.grads = [list(row.split(x.numels)) for row in rows.clone()] if case.P else []
    return x


def updates(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return PCGrad's updates for all orders."""
    return [torch.stack(reference.pcgrad(grads, order)).sum(0) for order in ORDERS]


def assert_one_of(actual: Tensor, candidates: Sequence[Tensor]) -> None:
    scale = max(float(c.abs().max()) for c in candidates)
    errors = [float((actual.double() - c).abs().max()) for c in candidates]
    assert min(errors) <= NEAR * scale
    # Candidates are equal, up to the roundings of a twin's search, or differ by more.
    assert max(errors) - min(errors) <= 1e-9 * scale or max(errors) > 100 * NEAR * scale


def expected(x: Inputs) -> list[Tensor]:
    """Return the reference's possible results of the operation; there are several if it draws orders."""
    rows, operation = list(x.J), x.case.operation
    if operation in METHODS:
        return [METHODS[operation].expected([rows], order)[0] for order in ORDERS]
    return {
        "gramian": lambda: [reference.gramian(rows)],
        "combine": lambda: [reference.combine(rows, x.w.tolist())],
        "project": lambda: [reference.project(rows, x.W.tolist())],
    }[operation]()


OF_MATRIX = [x for x in (*cases.MAIN, *cases.VARIANTS) if x not in METHODS or not METHODS[x].compared]
"""Others' roundings grow with the arguments that the benchmark gives them."""


@pytest.mark.parametrize("operation", OF_MATRIX)
def test_contestants_of_a_matrix_do_the_same(operation: str) -> None:
    x = inputs(Case(operation, 3, 1000))
    runs = contestants(x, INSTALLED)
    for name in runs.keys() - {floors.COPY}:
        assert_one_of(runs[name](), expected(x))
    assert OURS in runs


def test_one_contestant_uses_its_memory_again() -> None:
    runs = contestants(inputs(Case("pcgrad", 3, 1000)), INSTALLED)
    assert runs[OUT]() is runs[OUT]()
    assert runs[OURS]() is not runs[OURS]()


@pytest.mark.parametrize("S", [1, 4])
@pytest.mark.parametrize("operation", cases.PROGRAMS)
def test_contestants_of_gramians_do_the_same(operation: str, S: int) -> None:
    x = inputs(Case(operation, 3, 0, S=S))
    runs = contestants(x, INSTALLED)
    for name in runs.keys() - {floors.COPY}:
        found = runs[name]()
        weights = found.sum(-2) if found.ndim > 1 else found  # TorchJD's weights are already summed over tasks
        for w in weights.reshape(-1, 3):
            assert_one_of(w @ x.J, updates(list(x.J)))


def test_the_network_has_equal_weights_at_first() -> None:
    x = inputs(Case(cases.NETWORK, 3, 0))
    weights = contestants(x, INSTALLED)[OURS]()
    assert torch.equal(weights, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("form", [cases.DENSE, *cases.SUPPRESSED], ids=str)
@pytest.mark.parametrize("groups", ["model", "parameter"])
def test_contestants_of_a_step_do_the_same(groups: str, form: cases.Suppressed) -> None:
    P, n = 16_000, 16
    x = inputs(Case("surgery", 3, P, shapes="pieces", groups=groups, **form._asdict()))
    runs = contestants(x, INSTALLED)
    ours, naive = runs[OURS](), runs["naive"]()
    for name, result in ((OURS, torch.cat([g for _, g in ours[0]])), ("naive", torch.cat(naive))):
        keep = result != 0
        # The tolerance is five standard deviations of that many draws.
        draws = P if name == "naive" else P / form.block
        assert abs(float(keep.float().mean()) - (1 - form.p)) <= 5 * math.sqrt(form.p * (1 - form.p) / draws)
        scope = "update" if name == "naive" else form.scope
        for part in [slice(None)] if groups == "model" else [slice(a, a + P // n) for a in range(0, P, P // n)]:
            rows = list(x.J[:, part])
            methods = [partial(reference.pcgrad, order=order) for order in ORDERS]
            assert_one_of(result[part], [reference.suppressed(rows, keep[part], scope, method) for method in methods])


@pytest.mark.parametrize("operation", ["pcgrad", "surgery"])
def test_one_launch_takes_part_on_nvidias_gpus_alone(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(operation, 3, 16_000, shapes="matrix" if operation == "pcgrad" else "pieces")
    cuda = Inputs(case, torch.device("cuda"))
    assert ONE_LAUNCH not in contestants(Inputs(case, CPU), INSTALLED)
    assert ONE_LAUNCH in contestants(cuda, INSTALLED)
    assert ONE_LAUNCH not in contestants(Inputs(replace(case, T=5), cuda.device), INSTALLED)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert ONE_LAUNCH not in contestants(cuda, INSTALLED)


def test_only_the_one_launch_contestant_runs_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, before = Inputs(Case("pcgrad", 3, 1000, "bfloat16"), torch.device("cuda")), served.table
    seen = []

    def see() -> None:
        seen.append([P in one_launch(3, size, CPU) for size, P in ((2, 1000), (2, 999))])

    runs = {OURS: see} | _one_launch(x, see)
    monkeypatch.setattr(measure, "peak", lambda run, device: run())
    measure.measure(runs, OURS, 0.0, CPU)
    first, each = 3, [[False, False], [True, False]]
    assert seen == first * each[:1] + first * each[1:] + measure.FEWEST * each
    assert served.table is before


def test_entering_a_contestants_context_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, gradkern=0.5, naive=0.5)

    class Entered(SimpleNamespace):
        def __enter__(self) -> None:
            clock.timed.append(("entered", 0))

        def __exit__(self, *raised: object) -> None:
            clock.timed.append(("left", 0))

    clock.runs["naive"] = Entered(**vars(clock.runs["naive"]))
    measure.measure(clock.runs, OURS, 0.0, CPU)  # type: ignore[arg-type]
    assert clock.timed == [(OURS, 1), ("entered", 0), ("naive", 1), ("left", 0)] * 3


# Relative to the terms of a sum: for float32 as above; for bfloat16 three roundings to 8 bits, of weights, products and
# sums.
CLOSE = {"float32": NEAR, "bfloat16": 3 * 2**-8}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "form", [cases.DENSE, cases.Suppressed(0.45, 1, "update"), cases.Suppressed(0.45, 128, "update")]
)
@pytest.mark.parametrize("T", [1, 3])
def test_contestants_of_adamw_step_along_the_same(T: int, form: cases.Suppressed, dtype: str) -> None:
    P = 16_000
    x = Inputs(Case("adamw", T, P, dtype, shapes="pieces", **form._asdict()), CPU)
    terms = [w * torch.cat(row).double() for w, row in zip(x.weights[0].tolist(), x.grads, strict=True)]
    start = [p.detach().clone() for p in x.stepped]
    runs = contestants(x, INSTALLED)
    assert runs.keys() == {OURS, "naive", "foreach", floors.COPY}
    optimizers: list[Any] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    for name in runs.keys() - {floors.COPY}:
        with torch.no_grad():
            torch._foreach_copy_(x.stepped, start)
        runs[name]()
        assert all(p.grad is None for p in x.stepped)
        state = optimizers[-1].state
        m, v = (torch.cat([state[p][key] for p in x.stepped]).double() for key in ("exp_avg", "exp_avg_sq"))
        keep = m != 0 if form.p else torch.ones(P, dtype=torch.bool)  # 16-bit sums may cancel to 0
        draws = P / form.block if name == OURS else P  # five standard deviations, as above
        assert abs(float(keep.double().mean()) - (1 - form.p)) <= 5 * math.sqrt(form.p * (1 - form.p) / draws)
        size = sum(term.abs() for term in terms)
        assert bool(((m - 0.1 * keep * sum(terms)).abs() <= 0.1 * CLOSE[dtype] * size).all())
        assert bool(((v - 0.001 * keep * sum(terms) ** 2).abs() <= 0.002 * CLOSE[dtype] * size**2).all())
        # A first step is as long as the learning rate for any gradient, and the parameter is rounded.
        zeros = [torch.zeros(P)] * 2
        expected, *_ = reference.adamw(torch.cat(start), zeros, m / 0.1, 1, 1e-3, (0.9, 0.999), 0.01, 1e-8)
        rounding = torch.finfo(getattr(torch, dtype)).eps * expected.abs()
        assert bool(((torch.cat(x.stepped).detach() - expected).abs() <= rounding + 1e-3 * CLOSE[dtype]).all())
    hook.remove()


def test_contestants_of_entries_do_the_same() -> None:
    x = inputs(Case("gather", 3, 16_000, shapes="pieces"))
    runs = contestants(x, INSTALLED)
    for name in runs.keys() - {floors.COPY}:
        assert torch.equal(runs[name](), x.J[:, x.index])
    assert len(x.index) == 4096
    runs = {name: call for name, call in OPERATIONS["scatter"](x, INSTALLED).items() if name != floors.COPY}
    for call in runs.values():
        x.target = [torch.zeros_like(g) for row in x.grads for g in row]
        call()
        assert torch.equal(torch.cat(x.target[:16]), torch.zeros(16_000).index_copy(0, x.index, x.values))


def test_the_copy_copies_the_input() -> None:
    x = inputs(Case("surgery", 3, 160, shapes="pieces"))
    for tensor in x.target:
        tensor.zero_()
    contestants(x, INSTALLED)[floors.COPY]()
    assert torch.equal(torch.cat(x.target), x.J.flatten())


def test_about_half_of_the_pairs_conflict() -> None:
    M = (J := Inputs(Case("gramian", 40, 1000), CPU).J) @ J.T
    conflicts = (M[torch.triu_indices(40, 40, 1).unbind()] < 0).float().mean()
    assert abs(conflicts - 0.5) < 5 * 0.5 / math.sqrt(40 * 39 / 2)  # five standard deviations


@pytest.mark.parametrize("sweep", [cases.quick(), cases.full()], ids=["quick", "full"])
def test_a_sweep_has_every_operation_once(sweep: list[Case]) -> None:
    assert {case.operation for case in sweep} == OPERATIONS.keys()
    assert len(set(sweep)) == len(sweep)
    assert {case.p for case in sweep} >= {0.0, 0.3}


def test_bert_base_is_that_of_the_paper() -> None:
    assert len(BERT_BASE) == 199
    assert numbers(BERT_BASE) == 109_482_240  # "110M" in Devlin et al. 2019, exact by its weights


def test_floors_by_hand() -> None:
    step = partial(Case, "surgery", 3, 100, shapes="pieces")
    assert floors.least_bytes(Case("gramian", 3, 100)) == 4 * 300
    assert floors.least_bytes(Case("gramian", 3, 100, "bfloat16")) == 2 * 300
    assert floors.least_bytes(Case("combine", 3, 100)) == 4 * 400
    assert floors.least_bytes(Case("project", 3, 100)) == 4 * 600
    assert floors.least_bytes(Case("pcgrad", 3, 100)) == 4 * 700
    assert floors.least_bytes(Case("sum", 3, 100)) == 4 * 400
    assert floors.least_bytes(step(p=0.6)) == 4 * 700
    assert floors.least_bytes(step(p=0.6, block=128)) == pytest.approx(4 * (300 + 120 + 100))
    assert floors.least_bytes(step(p=0.6, block=128, scope="all")) == pytest.approx(4 * (120 + 120 + 100))
    adamw = partial(Case, "adamw", 3, 100, shapes="pieces")
    assert floors.least_bytes(adamw()) == 4 * 100 * (3 + 6)
    assert floors.least_bytes(adamw(p=0.6)) == 4 * 100 * (3 + 6)
    assert floors.least_bytes(adamw(p=0.6, block=128)) == pytest.approx(4 * 100 * (1.2 + 6))
    assert floors.least_bytes(adamw(dtype="bfloat16")) == 100 * (2 * (3 + 2) + 4 * 4)
    assert floors.least_bytes(Case("gather", 3, 100)) == 100 * (8 + 3 * 4 + 3 * 4)
    assert floors.least_bytes(Case("scatter", 3, 10_000)) == 4096 * (8 + 4 + 4)
    assert floors.least_bytes(Case("pcgrad-program", 3, 0, S=2)) == 2 * 9 * 12
    assert floors.least_bytes(Case(cases.NETWORK, 3, 0)) == 4 * 3 * (3 + 4096 + 1)
    assert floors.copied_bytes(Case("pcgrad", 3, 100)) == 2 * 4 * 300
    assert floors.copied_bytes(Case("pcgrad-program", 3, 0, S=2)) == 2 * 4 * 18


def test_quantiles_and_ratios_by_hand() -> None:
    assert measure.quantiles([float(k) for k in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert measure.quantiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}
    # The ratios per round are 2, 2 and 3; this is not the ratio of medians. Rounds that only one ran are left out.
    assert measure.ratio([2.0, 4.0, 12.0], [1.0, 2.0, 4.0])["p50"] == 2.0
    assert measure.ratio([30.0], [1.0, 2.0])["p50"] == 30.0


class Clock:
    """Contestants with given times, and a record of the timed calls: name and number of calls in a row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.timed: list[tuple[str, int]] = []
        self.runs = {name: SimpleNamespace(seconds=t, name=name) for name, t in seconds.items()}
        monkeypatch.setattr(measure, "timed", self.time)
        monkeypatch.setattr(measure, "_first", lambda call, device: (call.seconds, 0))

    def time(self, call: Any, calls: int, device: torch.device) -> float:
        self.timed.append((call.name, calls))
        return call.seconds


def test_contestants_take_turns_for_equal_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, gradkern=1e-3, naive=1e-2)
    found = measure.measure(clock.runs, OURS, 0.6, CPU)  # type: ignore[arg-type]
    assert clock.timed == [(OURS, 20), ("naive", 2)] * 15
    assert found.seconds == {OURS: [1e-3] * 15, "naive": [1e-2] * 15}


def test_long_calls_have_fewer_rounds_and_very_long_ones_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, TorchJD=30.0, gradkern=0.5, naive=2.9)
    found = measure.measure(clock.runs, OURS, 0.6, CPU)  # type: ignore[arg-type]
    assert clock.timed == [("TorchJD", 1), *[(OURS, 1), ("naive", 1)] * 3]
    assert found.seconds["TorchJD"] == [30.0]


def test_ours_and_contestants_of_similar_speed_always_have_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, gradkern=100.0, naive=499.0, TorchJD=501.0)
    found = measure.measure(clock.runs, OURS, 0.6, CPU)  # type: ignore[arg-type]
    assert {name: len(t) for name, t in found.seconds.items()} == {OURS: 3, "naive": 3, "TorchJD": 1}


def test_errors_of_others_are_recorded_and_ours_are_raised() -> None:
    def broken() -> None:
        raise RuntimeError("no such thing\nat all")

    found = measure.measure({OURS: list, "naive": broken}, OURS, 0.01, CPU)
    assert found.failed == {"naive": "RuntimeError: no such thing"}
    assert found.seconds.keys() == found.peaks.keys() == {OURS}
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.measure({OURS: broken, "naive": list}, OURS, 0.01, CPU)


def test_peak_memory_by_hand() -> None:
    def steps() -> None:
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        c = torch.empty(500)  # less than was freed
        del b, c

    rows = torch.randn(3, 1000)
    assert peak(steps, CPU) == 4 * 4000
    assert peak(lambda: None, CPU) == 0
    assert peak(lambda: rows @ rows.T, CPU) == 4 * 9
    assert peak(lambda: [rows.clone() for _ in range(5)], CPU) == 5 * 12_000
    assert peak(lambda: [rows.clone().sum() for _ in range(5)], CPU) == 12_000 + 5 * 4


SMALL = [
    *(Case(operation, T, P) for operation in ("gramian", "pcgrad") for T in (2, 3) for P in (100, 1000)),
    Case("surgery", 3, 1000, shapes="pieces"),
    Case("surgery", 3, 1000, shapes="pieces", p=0.3, block=128),
    Case("pcgrad-program", 3, 0, S=2),
    Case("gramian", 3, 10**13),
]


def test_a_run_prints_and_saves_its_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "quick", lambda: SMALL)
    out = tmp_path / "new" / "folder"
    main(["--quick", "--seconds", "0.01", "--out", str(out)])
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [Case(**row["case"]) for row in results["rows"]] == SMALL[:-1]
    (skipped,) = results["skipped"]
    assert Case(**skipped["case"]) == SMALL[-1]
    assert f"skipped: {SMALL[-1]}" in printed
    assert results["options"] == {"quick": True, "peers": False, "seconds": 0.01}
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["machine"]["BLAS runs its code for"] == processor.dispatch()
    assert results["versions"]["torch"] == torch.__version__

    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["contestants"]) for row in results["rows"])
    for row in results["rows"]:
        ours, copy = row["contestants"][OURS], row["contestants"][floors.COPY]
        assert row["ratios"].keys() == row["contestants"].keys() - {OURS}
        for name, figures in row["contestants"].items():
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"]
            line = next(line for line in lines if line["contestant"] == name and Case(**row["case"]) == _case(line))
            assert float(line["p50"]) == figures["p50"]
            assert line["ratio p50"] == ("" if name == OURS else str(row["ratios"][name]["p50"]))
        least, of_copy = floors.least_bytes(Case(**row["case"])), row["ratios"][floors.COPY]["p50"]
        assert ours["bytes"] == least
        assert ours["percent of copy"] == pytest.approx(100 * of_copy * least / copy["bytes"])
        assert copy["percent of copy"] == 100
        assert str(Case(**row["case"])) in printed
    plots = {path.name for path in out.glob("*.png")}
    drawn = {"gramian-float32.png", "pcgrad-float32.png", "suppression-pieces-3x1000-float32.png"}
    assert plots == (drawn if importlib.util.find_spec("matplotlib") else set())
    assert all((out / name).read_bytes().startswith(PNG) for name in plots)

    main(["--show", str(out / "results.json")])
    assert capsys.readouterr().out == f"{summary(results)}\n"
    assert summary(results) in printed


def _case(line: dict[str, str]) -> Case:
    kinds = {"T": int, "P": int, "S": int, "p": float, "block": int}
    return Case(**{name: kinds.get(name, str)(line[name]) for name in Case.__dataclass_fields__})


def test_a_contestant_that_would_take_too_long_is_left_out() -> None:
    def row(P: int, **seconds: float) -> dict[str, Any]:
        figures = {name: {"p50": t} for name, t in seconds.items()}
        return {"case": asdict(Case("pcgrad", 40, P)), "contestants": figures}

    rows = [row(100, naive=9.0), row(1000, gradkern=2.0, naive=2.0, matmul=0.9, copy=2.0)]
    assert run.too_long(Case("pcgrad", 40, 10_000), rows) == {"naive": "about 20 s a call"}
    assert run.too_long(Case("pcgrad", 40, 4000), rows) == {}
    assert run.too_long(Case("pcgrad", 16, 10_000), rows) == {}  # there is no earlier time
    row_without = run.measure_case(Case("gramian", 2, 100), CPU, INSTALLED, 0.01, {"naive": "no time"})
    assert row_without["contestants"].keys() == {OURS, "matmul", floors.COPY}
    assert row_without["absent"] == {"naive": "no time"}


def test_the_summary_by_hand() -> None:
    def row(operation: str, T: int, P: int, percent: float, **ratios: float) -> dict[str, Any]:
        return {
            "case": {"operation": operation, "T": T, "P": P, "dtype": "float32"},
            "contestants": {OURS: {"percent of copy": percent}},
            "ratios": {name: {"p50": value} for name, value in ratios.items()},
        }

    rows = [
        row("pcgrad", 3, 1000, 50, naive=0.5, TorchJD=12.34),
        row("pcgrad", 40, 10_000, 50, naive=1234.5),
        row("gramian", 3, 1000, 49.6, matmul=0.999),
    ]
    lines = summary({"peers": {"TorchJD": "9.9"}, "rows": rows}).splitlines()
    assert lines[0].endswith("the usual way / TorchJD 9.9")
    assert lines[2:6] == [
        "| T | P = 1,000 | P = 10,000 |",
        "|--:|--:|--:|",
        "| 3 | 0.50 / 12 |  |",
        "| 40 |  | 1,234 / – |",
    ]
    assert lines[-1] == "| 3 | 50 % / 1.0 |"


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_missing_device_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--device", name])
    assert stopped.value.code == 2
    assert "argument --device: " in capsys.readouterr().err


def test_a_missing_peer_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    def no_package(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(peers, "version", no_package)
    found = peers.find_peers(CPU)
    assert found.found == {}
    assert found.missing[peers.COMPILE] == "RuntimeError: No working C++ compiler found"
    assert "torchjd" in found.missing[peers.TORCHJD]
    assert "pytorch_optimizer" in found.missing[peers.PYTORCH_OPTIMIZER]


def test_measurements_before_an_interruption_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: Callable[..., dict[str, Any]] = run.measure_case

    def interrupted(case: Case, *rest: Any) -> dict[str, Any]:
        if case == SMALL[1]:
            raise KeyboardInterrupt
        return measured(case, *rest)

    monkeypatch.setattr(cases, "quick", lambda: SMALL)
    monkeypatch.setattr(run, "measure_case", interrupted)
    main(["--quick", "--seconds", "0.01", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [Case(**row["case"]) for row in results["rows"]] == SMALL[:1]
