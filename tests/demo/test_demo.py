"""Tests of ``gradkern demo``: its data, its training, and the command from arguments to files."""

import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="draws the figures")
pytest.importorskip("rich", reason="shows the progress")
pytest.importorskip("sklearn", reason="has the digits")

from matplotlib.figure import Figure
from rich.console import Console

import gradkern as gk
from gradkern import cli
from gradkern.aggregators import Scalarization, methods
from gradkern.demo import plots, training
from gradkern.demo.data import OFFSET, SIDE, Digits, overlaid_pairs, split_digits
from gradkern.demo.methods import METHODS
from gradkern.demo.model import TASKS
from gradkern.demo.results import Result
from gradkern.demo.table import table
from gradkern.demo.training import Run, Settings, compare, make_data

CPU = torch.device("cpu")
SMALL = Settings(train_pairs=256, test_pairs=256, batch_size=32, probe_every=2, warm_up=2)
PLAIN = [name for name, m in methods.METHODS.items() if issubclass(m.aggregator, Scalarization)]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with training.one_thread():
        yield


def small_run(method: str, settings: Settings = SMALL, epochs: int = 1) -> Run:
    run = Run(method, 0, make_data(0, settings), CPU, settings)
    for _ in range(epochs):
        run.epoch()
    return run


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return compare(list(METHODS), [0, 1], 1, CPU, SMALL)


def untimed(results: list[Result]) -> list[dict[str, object]]:
    return [{k: v for k, v in asdict(r).items() if not k.endswith("_ms")} for r in results]


def assert_same_weights(a: Run, b: Run) -> None:
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_no_digit_is_in_training_and_test() -> None:
    train, test = split_digits(np.random.default_rng(0))
    images = np.concatenate([train.images, test.images]).reshape(-1, 64)
    assert len(images) == 1797
    assert len(np.unique(images, axis=0)) == len(images)  # so no image of one part is in the other under another index
    assert set(train.labels) == set(test.labels) == set(range(10))
    assert images.min() == 0
    assert images.max() == 1


def test_labels_belong_to_the_digits_in_the_picture() -> None:
    # Digit d is a square of brightness (d + 1) / 10: the corners of the canvas, where nothing overlaps, tell both.
    labels = np.arange(10)
    digits = Digits(np.broadcast_to(((labels + 1) / 10)[:, None, None], (10, 8, 8)).astype(np.float32), labels)
    pairs = overlaid_pairs(digits, 500, np.random.default_rng(0))
    assert pairs.images.shape == (500, 1, SIDE, SIDE)
    left, right = (torch.round(pairs.images[:, 0, k, k] * 10).long() - 1 for k in (0, -1))
    assert torch.equal(pairs.labels[0], left)
    assert torch.equal(pairs.labels[1], right)
    assert torch.equal(pairs.labels[2], (left > right).long())
    assert bool(((left == right) & (pairs.labels[2] == 0)).any())  # ties occur, and count as not larger
    overlap = pairs.images[:, 0, OFFSET:8, OFFSET:8].flatten(1)
    torch.testing.assert_close(overlap, ((torch.maximum(left, right) + 1) / 10)[:, None].expand_as(overlap))


FAMILIES = {"pcgrad": gk.PCGrad, "gradvac": gk.GradVac, "lr": gk.PCGrad, "suppression": gk.PCGrad}
PARTNERS = {"random": "random", "average": "average", "similar": "most_similar", "different": "most_different"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_name_says(method: str) -> None:
    run = Run(method, 0, make_data(0, SMALL), CPU, SMALL)
    images, labels = run.train.images[:64], [label[:64] for label in run.train.labels]
    info = run.opt.backward(run.task_losses(images, labels))
    family, _, variant = method.partition("-")
    expected = methods.METHODS[method].aggregator if method in methods.METHODS else FAMILIES[family]
    assert type(run.opt.aggregator) is expected
    if isinstance(run.opt.aggregator, gk.PCGrad):
        assert run.opt.aggregator.partner == PARTNERS.get(variant, "all")
    if family == "suppression":
        assert info.kept is not None
        # Five standard deviations of the share kept are 0.011 for 52576 entries, and 0.12 for as few as 411 blocks.
        p, tolerance = (0.60, 0.12) if variant == "block" else (float(variant), 0.011)
        assert info.kept.item() == pytest.approx(1 - p, abs=tolerance)
    else:
        assert info.kept is None
    if family == "lr":
        assert info.cosines is not None
        assert info.step_scale is not None
        phi = info.cosines[torch.triu_indices(3, 3, 1).unbind()].mean()
        torch.testing.assert_close(info.step_scale, 1 + phi if variant == "attenuate" else 1 - phi)
    else:
        assert info.step_scale is None
    if isinstance(run.opt.aggregator, gk.GradDrop | gk.TrimmedMean):
        assert info.weights is None
        return
    assert info.weights.shape == ((6, 3) if variant == "module" else (3,))  # two convolutions, a layer, three heads


def test_methods_start_alike_and_see_the_same_batches() -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    data = make_data(3, SMALL)
    runs = [Run(method, 3, data, CPU, SMALL) for method in METHODS]
    for run in runs:
        assert_same_weights(runs[0], run)
    for run in runs:
        inner = run.step

        def step(images: torch.Tensor, labels: list[torch.Tensor], run: Run = run, inner=inner) -> torch.Tensor:  # type: ignore[no-untyped-def]
            seen.setdefault(run.method, []).append(torch.cat([images.flatten(), *labels]))
            return inner(images, labels)

        run.step = step  # type: ignore[method-assign]
        run.epoch()
        assert len(seen[run.method]) == 8
        assert torch.equal(torch.stack(seen[run.method]), torch.stack(seen["sum"]))


def test_in_turn_a_step_is_one_update_for_each_task() -> None:
    run = Run("pcgrad-memory", 0, make_data(0, SMALL), CPU, SMALL)
    images, labels = run.train.images[:64], [label[:64] for label in run.train.labels]
    before = torch.stack(run.task_losses(images, labels))
    losses = run.step(images, labels)
    assert losses[0] == before[0]
    assert (losses[1:] != before[1:]).all()  # the tasks before have moved the trunk
    updates = {name: run.opt.state[p]["step"].item() for name, p in run.model.named_parameters()}
    assert all(n == (3 if name.startswith("trunk") else 1) for name, n in updates.items())


@pytest.mark.parametrize("method", METHODS)
def test_probes_leave_no_trace(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = small_run(method, epochs=2)
    assert len(probed.cosines) == 2
    stream = torch.get_rng_state()
    probed.probe(probed.train.images[:8], [label[:8] for label in probed.train.labels])
    assert torch.equal(torch.get_rng_state(), stream)
    monkeypatch.setattr(Run, "probe", lambda self, images, labels: torch.eye(len(TASKS)))
    assert_same_weights(probed, small_run(method, epochs=2))


@pytest.mark.parametrize("method", ["sum", "pcgrad-memory", "gradvac-module", "suppression-block"])
def test_a_probe_tells_the_cosines_of_the_task_gradients(method: str) -> None:
    run = small_run(method)
    images, labels = run.train.images[:64], [label[:64] for label in run.train.labels]
    shared = list(run.model.trunk.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for loss in run.task_losses(images, labels)
    ]
    expected = torch.nn.functional.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1)
    torch.testing.assert_close(run.probe(images, labels), expected)


def test_a_seed_gives_the_same_numbers_again(results: list[Result]) -> None:
    methods = ["gradvac", "suppression-block"]  # gradvac has state and draws orders; suppression draws masks
    again = compare(methods, [1], 1, CPU, SMALL)
    assert untimed(again) == untimed([r for r in results if r.method in methods and r.seed == 1])
    # Other methods and seeds, other numbers.
    assert len({tuple(r.losses[0]) for r in results}) == 2 * len(METHODS)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_every_method_whole(results: list[Result], width: int) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(results))
    printed = capture.get()
    lines = printed.splitlines()
    for method in METHODS:
        of_method = [r for r in results if r.method == method]
        (line,) = [line for line in lines if line.split()[:1] == [method]]
        for values, digits in (
            ([100 * np.mean(r.accuracy) for r in of_method], 1),
            ([r.step_ms / b.step_ms for r, b in zip(of_method, results[:: len(METHODS)], strict=True)], 2),
        ):
            assert f"{np.mean(values):.{digits}f}" in line.split()
        assert ("-" in line.split()) == (method in PLAIN)
        if width == 120:
            assert line.count("±") == (7 if method in PLAIN else 8)
    ranking = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in METHODS]
    best = sorted(METHODS, key=lambda method: -np.mean([r.accuracy for r in results if r.method == method]))
    assert ranking == best
    assert "…" not in printed
    # The caption has one, and methods without surgery have none for its time.
    assert printed.count("±") == 8 * len(METHODS) + 1 - len(PLAIN)


def test_the_plot_has_the_tables_order(results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    plots.plot_outcome(results, tmp_path / "methods.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    best = sorted(METHODS, key=lambda method: -np.mean([r.accuracy for r in results if r.method == method]))
    assert labels == best


def test_each_row_of_panels_has_a_few_lines(
    results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    many = [replace(r, method=f"{r.method}{k}") for k in range(9) for r in results if r.method in ("mean", "mgda")]
    plots.plot_losses(results + many, tmp_path / "loss.png")
    lines = [[line.get_label() for line in axes.get_lines()] for axes in drawn[0].axes[::3]]
    assert {name for of_row in lines for name in of_row} == {*METHODS, *(r.method for r in many)}
    assert all(len(of_row) <= 2 + 5 for of_row in lines)  # two references, and a family or a few methods
    assert all(of_row[:2] == ["sum", "pcgrad"] for of_row in lines)


def test_demo_writes_table_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradkern.demo.run.Settings", lambda: SMALL)
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--epochs", "2", "--seeds", "0", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["epochs"]) for row in rows] == [(method, "0", "2") for method in METHODS]
    for row in rows:
        accuracies = [float(row[f"accuracy {task}"]) for task in TASKS]
        assert float(row["mean accuracy"]) == pytest.approx(np.mean(accuracies), rel=1e-5)  # six digits are written
        assert f"{100 * accuracies[0]:.1f}" in printed
        assert 0 <= float(row["conflicting pairs"]) < 1
        assert -1 < float(row["mean cosine"]) < 1
        relative = float(row["step ms"]) / float(rows[0]["step ms"])
        assert float(row["step relative to sum"]) == pytest.approx(relative, rel=1e-4)
        assert row["method"] in printed
    plain = {row["method"]: row["surgery ms"] for row in rows if row["method"] in PLAIN}
    assert plain == dict.fromkeys(PLAIN, "")
    assert all(0 < float(row["surgery ms"]) < float(row["step ms"]) for row in rows if row["method"] not in PLAIN)

    with (out / "epochs.csv").open() as file:
        epochs = list(csv.DictReader(file))
    assert [(row["method"], row["epoch"]) for row in epochs] == [(method, e) for method in METHODS for e in "12"]
    assert 0 < float(epochs[0]["loss left larger"]) < 1
    for name in ("methods.png", "loss.png", "cosine.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_the_default_is_large_enough_to_learn() -> None:
    (result,) = compare(["sum"], [0], 1, CPU, Settings())
    left, right, left_larger = result.accuracy
    assert min(left, right) > 0.5  # by chance 0.1
    assert left_larger > 0.6  # by chance 0.55: always "not larger"
    assert 0 < result.conflicting < 1


@pytest.mark.parametrize("methods", [["sum"], ["suppression-0.60", "gradvac"]])
def test_any_methods_can_be_chosen(methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradkern.demo.run.Settings", lambda: SMALL)
    arguments = ["--epochs", "1", "--seeds", "5", "6", "5", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["demo", "--method", *methods, *arguments]) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    in_order = [method for method in METHODS if method in methods]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, seed) for seed in "56" for m in in_order]
    assert all(row["step relative to sum"] == ("1" if methods == ["sum"] else "") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adam"], "--method: METHOD must be one of all, sum, mean, "),
        (["--method", "pcgrat"], "; got 'pcgrat' (the closest is 'pcgrad')"),
        (["--epochs", "0"], "--epochs: '0' is not a positive integer"),
        (["--epochs", "2.5"], "--epochs: '2.5' is not a positive integer"),
        (["--seeds", "1", "-3"], "--seeds: '-3' is not an integer from 0"),
        (["--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--device", "meta"], "--device: 'meta' is neither a CPU nor a CUDA device"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is not on this machine"),
        (["--out", __file__], "is not a folder"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["matplotlib", "rich", "sklearn"])
def test_without_the_extra_one_line_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f'gradkern demo needs {name}: pip install "gradkern[demo]"\n'


def test_interrupting_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "epoch", interrupted)
    assert cli.main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
