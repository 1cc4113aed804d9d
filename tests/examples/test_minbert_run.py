"""``python -m examples.minbert``: interrupted runs resume to the same bits, and all runs record the right results."""

import csv
import json
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="shows the progress")
pytest.importorskip("tokenizers", reason="tokenizes the sentences")
pytest.importorskip("safetensors", reason="reads the weights")

from rich.console import Console

import gradkern as gk
from examples.minbert import run as runs
from examples.minbert import weights
from examples.minbert.__main__ import main
from examples.minbert.examples import TASKS
from examples.minbert.heads import MultiTask
from examples.minbert.methods import METHODS
from examples.minbert.run import Run
from examples.minbert.schemes import SCHEMES
from examples.minbert.settings import Settings
from examples.minbert.suite import EXPERIMENTS, REPORT_WEIGHTS, SMALL, Size
from examples.minbert.suite import runs as suite_runs
from examples.minbert.training import WARM_UP

SILENT = Console(quiet=True)


def settings(scheme: str = "unitary-scalarization", method: str = "pcgrad", **changed: Any) -> Settings:
    """Return settings of a very small run: synthetic sentences, a random encoder, few steps."""
    return Settings(scheme, method, **{"epochs": 1, "steps": 2, "judged": 16, "lr": 1e-3, **changed})


def trained(of: Settings, out: Path) -> Run:
    run = Run(of, out, SILENT)
    run.train()
    return run


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def unmeasured(line: dict[str, Any]) -> dict[str, Any]:
    """Return a step's line without measured times and memory."""
    return {tag: value for tag, value in line.items() if not tag.startswith(("seconds/", "peak_bytes"))}


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch, of: str = "sst") -> None:
    """Send Ctrl-C in the task's forward pass after ``steps`` of its steps."""
    loss, count = MultiTask.loss, iter(range(10**6))

    def interrupted(self: MultiTask, task: int, batch: Any) -> Tensor:
        if TASKS[task] == of and self.training and next(count) == steps:
            signal.raise_signal(signal.SIGINT)
        return loss(self, task, batch)

    monkeypatch.setattr(MultiTask, "loss", interrupted)


RESUMED = {
    "PCGrad": settings(epochs=2, steps=4),
    "ours, suppressed": settings(epochs=2, steps=4, optimizer="gradkern", suppression=0.3),
    "GradVac, tasks in turn": settings("rhapsody", "gradvac", epochs=2, steps=9, sampling="round_robin"),
    "attention": settings("gradattention", "attention", epochs=2, steps=4),
    "three steps": settings("single-task-pretraining", epochs=1, steps=3),
    "three steps, in the second copy": settings("single-task-pretraining", epochs=1, steps=3),
    "three steps, in the last": settings("single-task-pretraining", epochs=1, steps=3),
    "a rate by conflict, AMP": settings(method="conflict-lr-amplify", epochs=2, steps=4, amp=True),
}
AT = {"three steps, in the second copy": ("para", 1), "three steps, in the last": ("para", 7)}
"""Task and number of its steps after which Ctrl-C comes."""


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, (task, steps) = RESUMED[name], AT.get(name, ("sst", 2))
    whole = trained(of, tmp_path / "whole")
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        interrupt_after(steps, patch, task)
        with pytest.raises(KeyboardInterrupt):
            Run(of, half, SILENT).train()
    taken = lines(half)
    assert 0 < len(taken) < len(lines(tmp_path / "whole"))
    assert not results(half)["complete"]
    with (half / "steps.jsonl").open("a") as file:
        file.write('{"step": 10000}\n')  # a step after the checkpoint, which must be ignored

    torch.manual_seed(99)  # a new process has another generator state
    run = Run(of, half, SILENT)
    run.resume()
    run.train()

    for (name, p), q in zip(whole.model.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert list(map(unmeasured, lines(half))) == list(map(unmeasured, lines(tmp_path / "whole")))
    assert results(half)["epochs_log"] == results(tmp_path / "whole")["epochs_log"]
    assert results(half)["best"] == results(tmp_path / "whole")["best"]
    assert results(half)["complete"]
    assert not (half / "checkpoint.pt").exists()


def test_a_second_interrupt_stops_at_once_and_leaves_the_last_epochs_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = settings(epochs=2, steps=3)
    whole = trained(of, tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    loss, count = MultiTask.loss, iter(range(10**6))

    def interrupted(self: MultiTask, task: int, batch: Any) -> Tensor:
        if task == 0 and self.training and next(count) == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(self, task, batch)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Run(of, tmp_path / "half", SILENT).train()
    assert signal.getsignal(signal.SIGINT) is before
    run = Run(of, tmp_path / "half", SILENT)
    run.resume()
    assert len(run.record.lines) == 3
    run.train()
    for p, q in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupt_during_evaluation_leaves_the_epochs_checkpoint(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = settings(epochs=2)
    whole = trained(of, tmp_path / "whole")
    evaluate, count = runs.evaluate, iter(range(1, 10))

    def interrupted(*given: Any) -> Any:
        if next(count) == 2 * epoch:  # dev comes first, then a part of the training set
            signal.raise_signal(signal.SIGINT)
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Run(of, tmp_path / "half", SILENT).train()
    run = Run(of, tmp_path / "half", SILENT)
    run.resume()
    assert len(run.record.log) == epoch
    run.train()
    for p, q in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert results(tmp_path / "half")["complete"]


def test_a_run_with_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        Run(settings(), tmp_path, SILENT).train()
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to a run with lr = 0.001, not 0.01"):
        Run(settings(lr=0.01), tmp_path, SILENT).resume()
    (tmp_path / "steps.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"steps.jsonl has 0 steps, but the checkpoint has 1"):
        Run(settings(), tmp_path, SILENT).resume()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs_and_records_its_phases(scheme: str, tmp_path: Path) -> None:
    run = trained(settings(scheme, batch_sizes=(4, 6, 4)), tmp_path)
    found = results(tmp_path)
    assert [entry["phase"] for entry in found["epochs_log"]] == found["phases"]
    assert found["phases"] == [phase.name for phase in SCHEMES[scheme].phases]
    assert found["sampling"] == SCHEMES[scheme].sampling
    assert found["batch_sizes"] == [4, 6, 4]
    assert found["parameters"] == sum(p.numel() for p in run.model.parameters())
    encoder = sum(p.numel() for p in run.model.encoder.parameters())
    assert found["trained"] == found["parameters"] - (encoder if scheme == "gradient-descent" else 0)
    assert found["total_loss"] == [line["total_loss"] for line in lines(tmp_path)]
    with (tmp_path / "epochs.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert [row["phase"] for row in epochs] == found["phases"]
    for row, entry in zip(epochs, found["epochs_log"], strict=True):  # written in 6 digits
        assert float(row["dev sst accuracy"]) == pytest.approx(entry["dev"]["sst"]["accuracy"], rel=1e-5)
        assert row["conflict"] == "" if entry["conflict"] is None else float(row["conflict"]) >= 0
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 2 * len(found["phases"]) + 1))
    for entry in found["epochs_log"]:
        trains = SCHEMES[scheme].phases[found["phases"].index(entry["phase"])].tasks
        seen = {task for task, loss in zip(TASKS, entry["train_loss"], strict=True) if loss is not None}
        assert seen <= set(trains)
        assert len(seen) == len(trains) or scheme == "rhapsody"  # each of its two steps trains one task


SUPPRESSED = 0.3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_its_name(method: str, tmp_path: Path) -> None:
    run = trained(settings(method=method, suppression=SUPPRESSED if method == "pcgrad" else None), tmp_path)
    if method == "single-task":
        assert results(tmp_path)["phases"] == [f"{task} alone" for task in TASKS]
        assert all(
            set(line) & {f"loss/{task}" for task in TASKS} == {f"loss/{line['phase'][:-6]}"} for line in lines(tmp_path)
        )
        return
    kind = method.split("-")[0]
    opt, step = run.training.opt, lines(tmp_path)[-1]
    kinds = {"unitary": gk.Sum, "gradvac": gk.GradVac, "attention": gk.GradAttention}
    assert type(opt.aggregator) is kinds.get(kind, gk.PCGrad)
    assert opt.groups == ("parameter" if kind == "gradvac" else "model")
    of_tasks = {tag: [step.get(f"{tag}/{task}") for task in TASKS] for tag in ("loss", "weight", "attention", "norm")}
    assert step["total_loss"] == pytest.approx(sum(of_tasks["loss"]))
    cosines = [value for tag, value in step.items() if tag.startswith("cosine/")]
    assert len(cosines) == (0 if kind == "unitary" else 3)
    if kind == "unitary":
        assert of_tasks["weight"] == [1, 1, 1]
    if kind == "attention":
        assert sum(of_tasks["attention"]) == pytest.approx(1)
    if kind == "pcgrad":
        assert opt.aggregator.partner == (method.partition("-")[2].replace("-", "_") or "all")
    if kind == "conflict":
        sign = 1 if method.endswith("attenuate") else -1
        assert step["step_scale"] == pytest.approx(1 + sign * sum(cosines) / 3, abs=1e-6)  # cosines in float32
    if method == "pcgrad":
        shared = sum(p.numel() for p in run.model.encoder.parameters())
        deviation = (SUPPRESSED * (1 - SUPPRESSED) / shared) ** 0.5
        assert step["kept"] == pytest.approx(1 - SUPPRESSED, abs=5 * deviation)


def test_given_task_weights_are_those_of_the_sum(tmp_path: Path) -> None:
    trained(settings(method="unitary", task_weights=(0.5, 2.0, 0.25)), tmp_path)
    assert [lines(tmp_path)[-1][f"weight/{task}"] for task in TASKS] == [0.5, 2.0, 0.25]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheme": "annealed"}, "scheme must be one of 'rhapsody', .*; got 'annealed'"),
        ({"method": "sum"}, "method must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'adamw', 'gradkern'; got 'sgd'"),
        ({"sampling": "all"}, "sampling must be one of"),
        ({"similarity": "mae"}, "similarity must be one of 'mse', 'pearson'; got 'mae'"),
        ({"epochs": 0}, "epochs must be from 1 to .*, got 0"),
        ({"judged": 0}, "judged must be from 1 to .*, got 0"),
        ({"max_length": 2}, "max_length must be from 3 to .*, got 2"),
        ({"seed": -1}, "seed must be from 0 to .*, got -1"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"suppression": float("nan")}, "suppression must be from 0 to below 1, got nan"),
        ({"lr": float("inf")}, "lr must be positive, got inf"),
        ({"heads": ("linear", "joint", "linear")}, r"heads\['sts'\] must be one of 'cosine', .*; got 'linear'"),
        ({"batch_sizes": (8, 0, 8)}, r"batch_sizes must be positive, got \(8, 0, 8\)"),
        ({"batch_sizes": (8, 8)}, r"batch_sizes must have 3 entries, .* got \(8, 8\)"),
        ({"task_weights": (1.0, 1.0, 1.0)}, "task_weights apply to the method 'unitary' only, not to 'pcgrad'"),
        ({"method": "single-task", "suppression": 0.3}, "suppression applies to tasks that train together.* got 0.3"),
        (
            {"method": "single-task", "sampling": "random"},
            "sampling applies to tasks that .* got 'random'",
        ),
        ({"batch_sizes": (8, 8, 1)}, r"'pearson' needs at least 2 pairs per batch, got \(8, 8, 1\)"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def test_the_reports_weights_make_all_losses_equal_at_chance_level() -> None:
    at_chance = torch.tensor([5.0, 2.0]).log().tolist()  # cross-entropy over five classes and over two
    a, b = (w * loss for w, loss in zip(REPORT_WEIGHTS, at_chance, strict=False))
    assert a == pytest.approx(b)
    assert REPORT_WEIGHTS[2] * 1 == pytest.approx(a)  # 1 - r without correlation


def test_tasks_that_take_turns_meet_the_last_gradients_of_the_others(tmp_path: Path) -> None:
    trained(settings("rhapsody", sampling="round_robin", steps=4), tmp_path)
    seen = [[task for task in TASKS if f"norm/{task}" in line and line[f"norm/{task}"] > 0] for line in lines(tmp_path)]
    assert seen == [["sst"], ["sst", "para"], ["sst", "para", "sts"], ["sst", "para", "sts"]]
    norms = [[line.get(f"norm/{task}") for task in TASKS] for line in lines(tmp_path)]
    assert norms[3][1:] == pytest.approx(norms[2][1:])  # these gradients are kept
    assert norms[3][0] != norms[2][0]


def test_gradients_kept_for_the_next_step_count_as_memory(tmp_path: Path) -> None:
    at = {}
    for sampling in ("round_robin", "annealed", "joint"):
        of = settings("rhapsody", sampling=sampling, steps=40, batch_sizes=(2, 2, 2))
        run = trained(of, tmp_path / sampling)
        at[sampling] = results(tmp_path / sampling)["peak_bytes"]
    row = 4 * sum(p.numel() for p in run.model.encoder.parameters())
    late = [line["step"] for line in lines(tmp_path / "annealed") if "peak_bytes" in line]
    assert len(late) == len(TASKS)  # one for each task
    first = {
        task: next(line["step"] for line in lines(tmp_path / "annealed") if f"loss/{task}" in line) for task in TASKS
    }
    assert min(late) >= max(*first.values(), WARM_UP + 1)
    for sampling in ("round_robin", "annealed"):
        assert at[sampling] > (len(TASKS) + 1) * row  # all tasks' last gradients, and a new one
        assert at[sampling] < at["joint"] + 2 * row  # joint steps have all tasks' gradients too


def test_conflicts_are_counted_between_whole_gradients_for_any_groups(tmp_path: Path) -> None:
    for method in ("pcgrad", "gradvac"):
        trained(settings(method=method, steps=1), tmp_path / method)
    (ours,), (of_groups,) = lines(tmp_path / "pcgrad"), lines(tmp_path / "gradvac")
    assert {tag: ours[tag] for tag in ours if tag.startswith("cosine/")} == pytest.approx(
        {tag: of_groups[tag] for tag in of_groups if tag.startswith("cosine/")},
        abs=1e-6,  # sums in another order
    )
    assert ours["conflict"] == of_groups["conflict"]
    assert ours["conflict"] == sum(ours[tag] < 0 for tag in ours if tag.startswith("cosine/")) / 3


def test_the_epochs_cosine_is_the_mean_over_pairs_and_steps(tmp_path: Path) -> None:
    trained(settings("rhapsody", sampling="round_robin", steps=4), tmp_path)
    (entry,) = results(tmp_path)["epochs_log"]
    seen = [line[tag] for line in lines(tmp_path) for tag in line if tag.startswith("cosine/")]
    assert len(seen) == 0 + 1 + 3 + 3  # pairs of tasks seen so far, step by step
    assert entry["cosine"] == pytest.approx(sum(seen) / len(seen))


def test_tasks_alone_have_no_overall_scores_and_a_step_of_each_is_timed(tmp_path: Path) -> None:
    run = trained(settings(method="single-task", steps=WARM_UP + 2), tmp_path)
    found = results(tmp_path)
    assert {(entry["average"], entry["overall"]) for entry in found["epochs_log"]} == {(None, None)}
    last = [line for line in lines(tmp_path) if line["step"] % (WARM_UP + 2) == 0]  # the timed step of each phase
    assert [line["phase"] for line in last] == [phase.name for phase in run.scheme.phases]
    assert found["seconds_per_step"]["total"] == pytest.approx(sum(line["seconds/total"] for line in last))


def weights_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[list[Any], list[Any]]]:
    """Train phases of one epoch; return the model's weights at the begin and at the end of each."""
    begins, ends = [], []
    make_training, evaluate = Run._training, runs.evaluate

    def now() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in run.model.named_parameters()}

    def training(self: Run) -> Any:
        begins.append(now())
        return make_training(self)

    def evaluated(model: MultiTask, loaders: Any) -> Any:
        if loaders is run.dev:
            ends.append(now())
        return evaluate(model, loaders)

    begins.append(now())
    monkeypatch.setattr(Run, "_training", training)
    monkeypatch.setattr(runs, "evaluate", evaluated)
    run.train()
    return begins, ends


def test_copies_are_averaged_then_trained_together_then_their_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings("single-task-pretraining"), tmp_path, SILENT)
    begins, ends = weights_at(run, monkeypatch)
    assert len(begins) == len(ends) == 5
    for name in begins[0]:
        in_encoder = name.startswith("encoder.")
        assert torch.equal(begins[1][name], begins[0][name])
        assert torch.equal(begins[2][name], begins[0][name])
        if in_encoder:
            mean = (ends[0][name] + ends[1][name] + ends[2][name]) / 3
            torch.testing.assert_close(begins[3][name], mean, rtol=1e-6, atol=1e-7)  # one more rounding
            assert torch.equal(ends[4][name], ends[3][name])
        else:
            task = int(name.split(".")[1])
            assert torch.equal(begins[3][name], ends[task][name])
            assert torch.equal(begins[4][name], ends[3][name])
            assert not torch.equal(ends[4][name], begins[4][name])
    assert not torch.equal(begins[3]["encoder.pooler.weight"], begins[0]["encoder.pooler.weight"])


def test_with_a_frozen_encoder_surgery_is_on_the_shared_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(settings("gradient-descent"), tmp_path, SILENT)
    [begin], [end] = weights_at(run, monkeypatch)
    for name in begin:
        assert torch.equal(begin[name], end[name]) == name.startswith("encoder.")
    assert all("cosine/sst-para" in line for line in lines(tmp_path))


def scored(*accuracies: float) -> Callable[..., Any]:
    """Return a fake ``evaluate`` with these accuracies of sentiment, epoch by epoch; all other scores are bad."""
    found = iter([a for a in accuracies for _ in ("dev", "train")])

    def evaluated(model: MultiTask, loaders: Any) -> Any:
        bad = {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "loss": 1.0}
        return {"sst": {**bad, "accuracy": next(found)}, "para": bad, "sts": {"pearson": 0.0, "loss": 1.0}}

    return evaluated


def test_a_phase_ends_when_patience_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "evaluate", scored(0.3, 0.6, 0.5, 0.6, 0.9))
    trained(settings(epochs=5, patience=2), tmp_path)
    found = results(tmp_path)
    assert [entry["average"] for entry in found["epochs_log"]] == pytest.approx([0.1, 0.2, 0.5 / 3, 0.2])
    assert found["best"]["epoch"] == 2
    assert found["best"]["sst"] == 0.6
    assert found["best"]["overall"] == pytest.approx((0.6 + 0.5) / 3)


def test_a_model_for_each_task_is_scored_by_its_own_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "evaluate", scored(0.3, 0.4, 0.9, 0.9, 0.9, 0.9))
    trained(settings(method="single-task", epochs=2), tmp_path)
    assert results(tmp_path)["best"]["sst"] == 0.4
    assert results(tmp_path)["best"]["epoch"] is None


def test_times_and_memory_are_those_of_steps_after_the_warm_up(tmp_path: Path) -> None:
    run = trained(settings(steps=WARM_UP + 3), tmp_path)
    found, steps = results(tmp_path), lines(tmp_path)
    assert [line["step"] - 1 for line in steps if "peak_bytes" in line] == [WARM_UP]
    assert found["peak_bytes"] == max(line["peak_bytes"] for line in steps if "peak_bytes" in line)
    assert found["peak_bytes"] > 4 * len(TASKS) * sum(p.numel() for p in run.model.encoder.parameters())  # the rows
    timed = [line for line in steps[WARM_UP:] if "seconds/total" in line]
    assert len(timed) == 2
    for part, seconds in found["seconds_per_step"].items():
        assert seconds == pytest.approx(sum(line[f"seconds/{part}"] for line in timed) / 2)  # the median of two
    split = [found["seconds_per_step"][part] for part in ("forward_backward", "surgery", "update")]
    assert all(seconds > 0 for seconds in split)


def test_under_amp_the_encoder_runs_in_bfloat16_on_parameters_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "evaluate", scored(0.5))
    run, seen = Run(settings(amp=True), tmp_path, SILENT), set()
    heads: set[torch.dtype] = set()
    run.model.encoder.layers[0].up.register_forward_hook(lambda module, given, found: seen.add(found.dtype))
    for head in run.model.heads:
        head.register_forward_hook(lambda module, given, found: heads.add(found.dtype))
    run.train()
    assert seen == {torch.bfloat16}
    assert heads == {torch.float32}  # in half precision similarities soon become equal
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert all("total_loss" in line for line in lines(tmp_path))  # it is finite


FILES = {
    "ids-sst": ["sentence\tid\tsentiment", *(f"words {'so ' * k}good\t{k}\t{k}" for k in range(5))],
    "quora": ["sentence1\tsentence2\tid\tis_duplicate", *(f"why {k}\twhat {k}\t{k}\t{k % 2}" for k in range(4))],
    "sts": ["sentence1\tsentence2\tid\tsimilarity", *(f"one {k}\ttwo {k}\t{k}\t{k}.5" for k in range(4))],
}


def test_sentences_are_read_from_files_and_progress_is_shown(tmp_path: Path, capsys: Any) -> None:
    for split in ("train", "dev"):
        for name, rows in FILES.items():
            tmp_path.joinpath(f"{name}-{split}.csv").write_text("\n".join(rows) + "\n")
    with tmp_path.joinpath("quora-train.csv").open("a") as file:
        file.write("[red]who[/b]\twhom\t9\t[/i]\n")
    command = ["train", "--data", str(tmp_path), *TINY, "--max-length", "6", "--batch-sizes", "2", "2", "2"]
    command += ["--method", "unitary", "--task-weights", "1", "2", "3"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "quora-train.csv:6: is_duplicate must be" in capsys.readouterr().err
    assert main([*command, "--skip-malformed", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "left out 1 malformed row:" in shown
    assert "got '[/i]'" in shown  # not read as markup
    best = results(tmp_path / "out")["best"]
    assert f"average {best['average']:.3f}, overall {best['overall']:.3f}" in shown
    assert results(tmp_path / "out")["data"] == str(tmp_path)


@pytest.mark.skipif(find_spec(weights.MODULE) is None, reason="the package with the weights is not installed")
def test_minilm_trains(tmp_path: Path) -> None:
    run = trained(settings(weights="minilm", steps=1, judged=2, batch_sizes=(2, 2, 2), max_length=8), tmp_path)
    assert run.model.mean_pooled
    assert run.record.parameters > 22e6
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    assert 0 < lines(tmp_path)[0]["total_loss"] < 10  # at chance level the three losses are 1.6, 0.7 and 1


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_without_checkpoint_may_start_over(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", *TINY, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        assert main(command) == 130
    if not kept:
        (tmp_path / "checkpoint.pt").unlink()  # as if the run had been killed
    assert main(command) == (1 if kept else 0)


TINY = ["--steps", "2", "--epochs", "1", "--judged", "16"]


def test_the_command_line_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = ["train", "--method", "gradvac", "--optimizer", "gradkern", *TINY, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert results(tmp_path)["complete"]
    assert results(tmp_path)["method"] == "gradvac"
    assert main([*command, "--resume"]) == 1
    assert "nothing to resume" in capsys.readouterr().err
    before = (tmp_path / "run.json").read_bytes()
    assert main(command) == 1  # nothing is overwritten
    assert (tmp_path / "run.json").read_bytes() == before
    assert main(["train", "--heads", "linear", "joint", "linear"]) == 1
    assert "heads['sts']" in capsys.readouterr().err
    assert main(["train", "--data", str(tmp_path)]) == 1
    assert "ids-sst-train.csv" in capsys.readouterr().err
    for wrong in (
        ["--lr", "0"],
        ["--suppression", "1"],
        ["--steps", "-1"],
        ["--method", "sum"],
        ["--dropout", "nan"],
        ["--seed", "-1"],
    ):
        with pytest.raises(SystemExit):
            main(["train", *wrong])


def test_the_suite_has_every_scheme_method_and_sampler_of_the_reports() -> None:
    found = suite_runs(SMALL, data=None, weights="random", device="cpu").values()
    assert {of.scheme for of in found} == set(SCHEMES)
    assert {of.method for of in found} == set(METHODS)
    assert {of.resolved().sampling for of in found} == {"joint", "round_robin", "random", "annealed"}
    assert {of.task_weights for of in found} == {None, REPORT_WEIGHTS}
    assert {of.suppression for of in found} == {None, 0.30, 0.60}  # the smallest and the largest value in the report
    full = suite_runs(Size(), data=None, weights="random", device="cpu")
    assert {of.lr for of in full.values()} == {None}
    assert len(full) == sum(map(len, EXPERIMENTS.values()))


def test_an_interrupted_suite_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("examples.minbert.suite.SMALL", Size(epochs=1, steps=2, judged=16, lr=1e-3))
    few = {"unitary-scalarization": [{"method": "unitary"}, {"method": "pcgrad"}]}
    monkeypatch.setattr("examples.minbert.suite.EXPERIMENTS", few)
    command = ["suite", "--small", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert main(command) == 130
    first, second = (tmp_path / f"unitary-scalarization-{method}" for method in ("unitary", "pcgrad"))
    assert results(first)["complete"]
    assert not results(second)["complete"]
    written = (first / "run.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (first / "run.json").stat().st_mtime_ns == written
    assert results(second)["complete"]
    assert len(lines(second)) == 2
    assert "pcgrad" in (tmp_path / "report.md").read_text()
