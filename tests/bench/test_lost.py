"""``python -m bench.lost``: its figures are those of naive updates, and measuring leaves training alone."""

import json
from collections.abc import Sequence
from itertools import chain, permutations, product, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import gradkern as gk

pytest.importorskip("tokenizers", reason="tokenizes the sentences")

from bench.lost import problems
from bench.lost.__main__ import main
from bench.lost.problems import SCHEME, Pass, Problem, digits, in_one_pass
from bench.lost.run import METHODS, train
from bench.lost.shares import measured, ways
from bench.lost.table import table
from examples.minbert.batches import Batch, loaders
from examples.minbert.bert import Bert, Config
from examples.minbert.examples import TASKS
from examples.minbert.files import LAYOUTS
from examples.minbert.heads import MultiTask
from examples.minbert.synthetic import synthetic
from examples.minbert.tokens import Tokenizer
from gradkern import reference
from gradkern.demo.training import Settings
from tests.models import MultiHead, flat, problem, task_gradients

T = 3
ORDERS = list(product(permutations((1, 2)), permutations((0, 2)), permutations((0, 1))))
EXACT = "activations, exact"
SUMMED, PER_EXAMPLE = "features, summed", "features, per example"


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "PAIRS", Settings(train_pairs=32, test_pairs=1, batch_size=16))


def a_pass(model: MultiHead, x: Tensor, y: Tensor) -> Pass:
    h = model.trunk(x)
    losses = [(head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)]
    return Pass(h, losses)


def small() -> tuple[Problem, Pass]:
    """Return a problem whose tasks conflict, and its forward pass."""
    model, x, y = problem(T)
    given = a_pass(model, x, y)
    return Problem(model, model.trunk, repeat(given), lr=1e-2, every=1), given


def updated(method: str, grads: Sequence[Tensor], order: Sequence[Sequence[int]]) -> Tensor:
    if method == "pcgrad":
        return torch.stack(reference.pcgrad(grads, order)).sum(0)
    return reference.mgda(grads) if method == "mgda" else reference.upgrad(grads)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_naive_updates(method: str) -> None:
    """Some order of PCGrad gives all of them, so all ways have the same one."""
    made, given = small()
    trunk = list(made.trunk.parameters())
    grads = [flat(row, trunk) for row in task_gradients(given.losses, trunk)]
    by_features = [H for (H,) in task_gradients(given.losses, [given.features]) if H is not None]
    seen = {SUMMED: [H.sum(0) for H in by_features], PER_EXAMPLE: [H.flatten() for H in by_features]}
    found = measured(made, given, method, 0, ways(0))
    plain = torch.stack(grads).sum(0) if method == "pcgrad" else torch.stack(grads).mean(0)

    def expected(order: Sequence[Sequence[int]]) -> list[float]:
        rows = updated(method, grads, order)
        figures = [plain - rows]
        for features in seen.values():
            basis = torch.stack(features, 1)
            w = torch.linalg.lstsq(basis, updated(method, features, order).unsqueeze(1)).solution
            figures.append(torch.stack(grads, 1) @ w[:, 0] - rows)
        return [float(figure.norm() / plain.norm()) for figure in figures]

    figures = [found.surgery, found.off[SUMMED], found.off[PER_EXAMPLE]]
    errors = [max(abs(a - b) for a, b in zip(figures, expected(order), strict=True)) for order in ORDERS]
    # Both solve small well-conditioned problems in float64.
    assert min(errors) < 1e-9
    assert all(figure > 0.01 for figure in figures)
    assert found.off[EXACT] < 1e-12
    M = torch.stack(grads) @ torch.stack(grads).T
    for way, of in seen.items():
        pairs = [(M[i, j] < 0) == (of[i].flatten() @ of[j].flatten() < 0) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found.agreement[way] == pytest.approx(sum(map(float, pairs)) / 3)


def test_a_wide_sketch_is_exact_and_a_narrow_one_is_not() -> None:
    made, given = small()
    sketches = {k: {"through": "activations", "gramian": gk.Sketch(k, seed=0, report=True)} for k in (1, 1000)}
    found = measured(made, given, "upgrad", 0, {str(k): way for k, way in sketches.items()})
    assert found.off["1000"] < 1e-5  # as float32 rounds
    assert found.agreement["1000"] == 1
    assert found.off["1"] > 0.01
    again = measured(made, given, "upgrad", 0, {"1": sketches[1]})
    assert again.off["1"] != found.off["1"]  # other signs
    assert again.surgery == found.surgery


def test_gradients_that_agree_leave_nothing_to_lose() -> None:
    made, given = small()
    found = measured(made, Pass(given.features, [given.losses[0], 2 * given.losses[0]]), "pcgrad", 0, ways(0))
    assert found.surgery < 1e-6  # as float32 rounds
    assert set(found.agreement.values()) == {1.0}


@pytest.mark.usefixtures("few_digits")
def test_measuring_leaves_training_alone() -> None:
    ends = []
    for every in (1, 100):
        made = digits(0)._replace(every=every)
        results: dict[str, Any] = {"rows": []}
        train("digits", made, 0, 3, results)
        ends.append(parameters_to_vector(made.model.parameters()))
        assert len(results["rows"]) == (3 if every == 1 else 1) * len(METHODS)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], parameters_to_vector(digits(0).model.parameters()))


def test_one_pass_gives_the_losses_of_a_pass_for_each_task() -> None:
    examples = synthetic(0, 16)["train"]
    tokenizer = Tokenizer.trained(chain.from_iterable(e.sentences for task in TASKS for e in examples[task]))
    config = Config(layers=1, hidden=16, heads=2, inner=32, vocabulary=tokenizer.vocabulary, positions=40)
    model = MultiTask(Bert(config, dropout=0.0), SCHEME.heads_by_task, SCHEME.losses)
    made = loaders(examples, tokenizer.encode, (3, 4, 5), 0, torch.device("cpu"))
    batches: list[Batch] = [next(iter(loader)) for loader in made]
    features, losses = in_one_pass(model, batches)
    assert features.shape == (3 + 2 * 4 + 2 * 5, 16)
    of_each = [model.loss(task, batch) for task, batch in enumerate(batches)]
    torch.testing.assert_close(losses, of_each)  # sums round in another order


def write(folder: Path) -> None:
    """Write a training set of the course project's files."""
    for task, examples in synthetic(0, 16)["train"].items():
        layout = LAYOUTS[task]
        lines = ["\t".join(("id", *layout.sentences, layout.label))]
        lines += ["\t".join((e.id, *e.sentences, str(e.label))) for e in examples]
        (folder / f"{layout.name}-train.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("few_digits")
def test_a_run_prints_and_saves_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    main(["--data", str(tmp_path), "--seeds", "2", "--steps", "1", "--out", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "lost.json").read_text())
    assert results["skipped"] == []
    rows = [(row["problem"], row["seed"], row["method"]) for row in results["rows"]]
    assert rows == list(product(("minBERT", "digits"), (0, 1), METHODS))
    for row in results["rows"]:
        assert set(row["off"]) == set(row["agreement"]) == set(ways(0))
        assert row["off"][EXACT] < 1e-5  # as float32 rounds
        assert all(0 <= share <= 1 for share in row["agreement"].values())
    main(["--show", str(tmp_path / "new" / "lost.json")])
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("folder", [None, "empty"])
def test_without_sentences_digits_are_left(
    folder: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            *(["--data", str(tmp_path / folder)] if folder else []),
            "--seeds",
            "1",
            "--steps",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    results = json.loads((tmp_path / "lost.json").read_text())
    assert {row["problem"] for row in results["rows"]} == {"digits"}
    why = "ids-sst-train.csv" if folder else "give --data"
    (skipped,) = results["skipped"]
    assert skipped["problem"] == "minBERT"
    assert why in skipped["why"]
    assert f"- Left out: minBERT ({skipped['why']})" in capsys.readouterr().out


def test_the_table_by_hand() -> None:
    def row(surgery: float, off: float, agreement: float) -> dict[str, Any]:
        of = {"problem": "nets", "P": 12_345, "method": "mgda", "surgery": surgery}
        return of | {"off": {"a way": off}, "agreement": {"a way": agreement}}

    results = {
        "machine": {"model": "a CPU"},
        "versions": {"python": "3.14", "torch": "9.9"},
        "skipped": [],
        "rows": [row(0.5, 0.05, 1.0), row(0.5, 0.1, 1.0), row(0.5, 1.0, 0.5), row(0.00001, 1.0, 0.5)],
    }
    assert table(results).splitlines()[:6] == [
        "a CPU, Python 3.14, torch 9.9",
        "",
        "| nets, P = 12,345 | mgda, 3 of 4 | agreement |",
        "|---|--:|--:|",
        "| what surgery changes | 0.500 (0.500–0.500) | – |",
        # quantiles of .1, .2, 2: .1 + .4 · .1, and .2 + .6 · 1.8
        "| a way | 0.200 (0.140–1.280) | 75.0 % |",
    ]
