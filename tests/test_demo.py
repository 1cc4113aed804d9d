"""``gradkern demo``: its data, its training, and the command from arguments to files."""

import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from gradkern import cli
from gradkern.demo import training
from gradkern.demo.data import OFFSET, SIDE, Digits, overlaid_pairs, split_digits
from gradkern.demo.model import TASKS
from gradkern.demo.results import Result
from gradkern.demo.training import Run, Settings, compare, make_data

CPU = torch.device("cpu")
SMALL = Settings(train_pairs=512, test_pairs=256, batch_size=64, probe_every=2, warm_up=2)
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


def test_methods_start_alike_and_see_the_same_batches() -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    runs = [Run(method, 3, make_data(3, SMALL), CPU, SMALL) for method in ("Sum", "PCGrad")]
    assert_same_weights(*runs)
    for run in runs:
        inner = run.step

        def step(images: torch.Tensor, labels: list[torch.Tensor], run: Run = run, inner=inner) -> torch.Tensor:  # type: ignore[no-untyped-def]
            seen.setdefault(run.method, []).append(torch.cat([images.flatten(), *labels]))
            return inner(images, labels)

        run.step = step  # type: ignore[method-assign]
        run.epoch()
    assert len(seen["Sum"]) == 8
    assert torch.equal(torch.stack(seen["Sum"]), torch.stack(seen["PCGrad"]))
    assert not torch.equal(runs[0].model.trunk[0].weight, runs[1].model.trunk[0].weight)


@pytest.mark.parametrize("method", ["Sum", "PCGrad"])
def test_probes_leave_no_trace(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = small_run(method, epochs=2)
    assert len(probed.cosines) == 2
    stream = torch.get_rng_state()
    probed.probe(probed.train.images[:8], [label[:8] for label in probed.train.labels])
    assert torch.equal(torch.get_rng_state(), stream)
    monkeypatch.setattr(Run, "probe", lambda self, images, labels: torch.eye(len(TASKS)))
    assert_same_weights(probed, small_run(method, epochs=2))


def test_a_probe_tells_the_cosines_of_the_task_gradients() -> None:
    run = small_run("Sum")
    images, labels = run.train.images[:64], [label[:64] for label in run.train.labels]
    shared = list(run.model.trunk.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
        for loss in run.task_losses(images, labels)
    ]
    expected = torch.nn.functional.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1)
    torch.testing.assert_close(run.probe(images, labels), expected)


def test_a_seed_gives_the_same_numbers_again() -> None:
    results = [compare(["Sum", "PCGrad"], [0, 1], 1, CPU, SMALL) for _ in range(2)]
    assert untimed(results[0]) == untimed(results[1])
    assert len({tuple(r.losses[0]) for r in results[0]}) == 4  # other methods and seeds, other numbers


def test_demo_writes_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--epochs", "1", "--seed", "0", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["epochs"]) for row in rows] == [("Sum", "0", "1"), ("PCGrad", "0", "1")]
    for row in rows:
        assert float(row["accuracy left"]) > 0.3  # by chance 0.1
        assert float(row["accuracy right"]) > 0.3
        assert float(row["accuracy left larger"]) > 0.6  # by chance 0.55: always "not larger"
        assert 0 < float(row["conflicting pairs"]) < 1
        assert -1 < float(row["mean cosine"]) < 1
        assert float(row["step ms"]) > 0
    assert rows[0]["surgery ms"] == ""
    assert 0 < float(rows[1]["surgery ms"]) < float(rows[1]["step ms"])
    assert rows[0]["step relative to Sum"] == "1"
    relative = float(rows[1]["step ms"]) / float(rows[0]["step ms"])
    assert float(rows[1]["step relative to Sum"]) == pytest.approx(relative, rel=1e-4)
    for name in ("accuracy: left (%)", "conflicting pairs (%)", "mean cosine", "surgery per step (ms)", "PCGrad"):
        assert name in printed
    assert f"{100 * float(rows[0]['accuracy left']):.1f}" in printed

    with (out / "epochs.csv").open() as file:
        (first, _) = csv.DictReader(file)
    assert first["epoch"] == "1"
    assert 0 < float(first["loss left larger"]) < 1
    for name in ("loss.png", "cosine.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_one_method_has_nothing_to_be_relative_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradkern.demo.run.Settings", lambda: SMALL)
    arguments = ["--method", "pcgrad", "--epochs", "2", "--seed", "5", "6", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["demo", *arguments]) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [("PCGrad", "5"), ("PCGrad", "6")]
    assert all(row["step relative to Sum"] == "" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adam"], "--method: 'adam' is none of all, sum, pcgrad"),
        (["--epochs", "0"], "--epochs: '0' is not a positive integer"),
        (["--epochs", "2.5"], "--epochs: '2.5' is not a positive integer"),
        (["--seed", "1", "-3"], "--seed: '-3' is not an integer from 0"),
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
