"""``python -m examples.minbert report``: tables and figures from made-up folders of runs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="draws the figures")
pytest.importorskip("tokenizers", reason="tokenizes the sentences")
pytest.importorskip("safetensors", reason="reads the weights")

from matplotlib.figure import Figure

from examples.minbert.comparisons import experiments, grids, labelled
from examples.minbert.examples import TASKS
from examples.minbert.outcomes import found, rows
from examples.minbert.report import report

PNG = b"\x89PNG\r\n\x1a\n"
Json = dict[str, Any]


NONE: Json = {"cosine": None, "cosines": {}, "conflict": None}
"""Values of an epoch without task gradients."""


def measured(sst: float, para: float, sts: float) -> Json:
    """Return measures of one part of the data: precision is accuracy - 0.1, recall accuracy + 0.1, majority 0.25."""
    classified = [
        {"accuracy": a, "precision": a - 0.1, "recall": a + 0.1, "majority": 0.25, "loss": 1 - a} for a in (sst, para)
    ]
    return dict(zip(TASKS, (*classified, {"pearson": sts, "loss": 1 - sts}), strict=True))


def epoch(number: int, dev: tuple[float, float, float], trained: tuple[str, ...] = TASKS, **changed: object) -> Json:
    sst, para, sts = dev
    return {
        "phase": "fine-tuning",
        "epoch": number,
        "step": 10 * number,
        "train_loss": [1 / number if task in trained else None for task in TASKS],
        "dev": measured(*dev),
        "train": measured(sst + 0.05, para + 0.05, sts + 0.05),
        "average": sum(dev) / 3,
        "overall": (sst + para + (sts + 1) / 2) / 3,
        "cosine": (0.2 + 0.1 / number) / 3,
        "cosines": {"sst-para": 0.1 / number, "sst-sts": -0.1, "para-sts": 0.3},
        "conflict": 0.25 * number,
    } | changed


def run_json(
    name: str, log: list[Json], best: int | None, milliseconds: float | None, peak: int, **changed: object
) -> Json:
    """Return a ``run.json``; ``best`` is the epoch's number. Surgery takes 10 ms of a step, and the update 20 ms."""
    entry = next((e for e in log if e["epoch"] == best), None)
    best_scores = entry and {
        "epoch": best,
        "average": entry["average"],
        "overall": entry["overall"],
        **{task: entry["dev"][task]["pearson" if task == "sts" else "accuracy"] for task in TASKS},
    }
    spent = None if milliseconds is None else milliseconds / 1e3
    return {
        "name": name,
        "scheme": "gradattention",
        "method": "unitary",
        "sampling": "joint",
        "task_weights": None,
        "suppression": None,
        "dropout": 0.1,
        "optimizer": "adamw",
        "weights": "random",
        "data": "synthetic",
        "heads": ["linear", "joint", "joint"],
        "similarity": "mse",
        "seed": 0,
        "epochs": 2,
        "steps": None,
        "judged": None,
        "patience": None,
        "batch_sizes": [8, 20, 8],
        "max_length": 128,
        "lr": 1e-5,
        "device": "cpu",
        "machine": "a processor",
        "threads": 2,
        "amp": False,
        "versions": {"torch": "2.13.0", "python": "3.11", "gradkern": "0"},
        "parameters": 1000,
        "trained": 1000,
        "phases": ["fine-tuning"],
        "total_loss": [None if k == 8 else 3 / k for k in range(1, 41)],  # one is not finite
        "epochs_log": log,
        "best": best_scores,
        "seconds_per_step": {
            "forward_backward": spent and spent - 0.03,
            "surgery": spent and 0.01,
            "update": spent and 0.02,
            "total": spent,
        },
        "peak_bytes": peak,
        "complete": True,
    } | changed


def written(folder: Path, run: Json) -> Path:
    run_folder = folder / run["name"]
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text(json.dumps(run))
    return run_folder


def unitary(seed: int, milliseconds: float) -> Json:
    log = [epoch(k, (0.3 + 0.1 * k + 0.02 * seed, 0.6, 0.2), **NONE) for k in (1, 2)]
    return run_json(f"unitary-{seed}", log, 2, milliseconds, 100_000, seed=seed)


def surgery(name: str, milliseconds: float, score: float = 0.4, **changed: object) -> Json:
    """Return a run whose first epoch is the better one."""
    log = [epoch(1, (score, 0.7, 0.3)), epoch(2, (score - 0.1, 0.7, 0.2))]
    return run_json(name, log, 1, milliseconds, 112_000, **changed)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: two schemes, two seeds, two grids, a run without epochs, and one with a model for each task."""
    folder = tmp_path_factory.mktemp("suite")
    for run in (unitary(0, 100), unitary(1, 140)):
        written(folder, run)
    weighted = unitary(0, 170) | {"name": "weighted", "task_weights": [1.0, 2.3219, 1.6094]}
    written(folder, weighted)
    written(folder, surgery("pcgrad", 150, method="pcgrad"))
    written(folder, surgery("ours", 130, method="pcgrad", optimizer="gradkern"))
    written(folder, surgery("attention", 180, method="attention", complete=False))
    for p in (0.3, 0.45):
        written(folder, surgery(f"s{p}", 200, 0.4 - p / 10, method="pcgrad", suppression=p, dropout=p))
    written(folder, surgery("s-dropout", 200, 0.35, method="pcgrad", dropout=0.3))
    alone = [epoch(k + 1, (0.5, 0.5, 0.5), (task,), **NONE, phase=f"{task} alone") for k, task in enumerate(TASKS)]
    alone += [epoch(k + 4, (0.6, 0.4, 0.7), (task,), **NONE, phase=f"{task} alone") for k, task in enumerate(TASKS)]
    best = {"epoch": None, "average": 1.8 / 3, "overall": 1.95 / 3, "sst": 0.6, "para": 0.5, "sts": 0.7}
    phases = [f"{task} alone" for task in TASKS]
    written(folder, run_json("alone", alone, None, 50, 50_000, method="single-task", phases=phases) | {"best": best})
    of_other = {"scheme": "rhapsody", "batch_sizes": [8, 8, 8]}
    for method, sampling in (("unitary", "joint"), ("pcgrad", "joint"), ("pcgrad", "annealed")):
        written(folder / "other", surgery(f"{method}-{sampling}", 300, method=method, sampling=sampling, **of_other))
    untimed = dict.fromkeys(("forward_backward", "surgery", "update", "total"))
    nothing = {"epochs_log": [], "best": None, "complete": False, "peak_bytes": None, "seconds_per_step": untimed}
    written(folder / "other", surgery("begun", 300, method="gradvac", **of_other) | nothing)
    return folder


@pytest.fixture(scope="module")
def written_report(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Figure]]:
    """The folder of the suite's report, and all figures by name."""
    folder = tmp_path_factory.mktemp("out") / "new"
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path, **arguments: float) -> None:
        figures[path.stem] = figure
        save(figure, path, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        assert report([suite], folder) == (folder / "report.md").read_text(encoding="utf-8")
    return folder, figures


@pytest.fixture
def out(written_report: tuple[Path, dict[str, Figure]]) -> Path:
    return written_report[0]


@pytest.fixture
def figures(written_report: tuple[Path, dict[str, Figure]]) -> dict[str, Figure]:
    return written_report[1]


def lines(out: Path, heading: str, experiment: str) -> dict[str, dict[str, str]]:
    """Return the lines of a table of the report, by first column and heading."""
    text = (out / "report.md").read_text(encoding="utf-8")
    part = text.split(f"\n## {heading}\n")[1].split(f"### {experiment}\n")[1].split("\n#")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line[:1] == "|"]
    cells = cells[: next((k for k, line in enumerate(cells) if line[0] == "report"), None)]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_best_epoch_with_both_overall_scores(out: Path) -> None:
    pcgrad = lines(out, "Scores", "gradattention")["pcgrad"]
    assert [pcgrad[f"sst {name}"] for name in ("accuracy", "precision", "recall")] == ["0.400", "0.300", "0.500"]
    assert (pcgrad["para accuracy"], pcgrad["sts pearson"], pcgrad["best epoch"]) == ("0.700", "0.300", "1")
    assert pcgrad["average"] == f"{(0.4 + 0.7 + 0.3) / 3:.3f}"
    assert pcgrad["overall"] == f"{(0.4 + 0.7 + 0.65) / 3:.3f}"
    # The cosines of three pairs in two epochs are 0.1, -0.1, 0.3 and 0.05, -0.1, 0.3; 25 % and 50 % of pairs conflict.
    assert (pcgrad["cosine"], pcgrad["conflict"]) == (f"{(0.3 + 0.25) / 6:.2f}", f"{0.375:.2f}")


def test_all_trials_stand_side_by_side(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    trials = text.split("\n## Side by side\n")[1].split("\n#")[0].strip().splitlines()[2:]
    assert [line.split(" | ")[0] for line in trials] == ["| rhapsody"] * 5 + ["| gradattention"] * 10
    assert "| gradattention | most frequent class | 0.250 | 0.250 | – | – | – | – | – | – |" in trials
    overall = f"{1.4 / 3:.3f} | {1.75 / 3:.3f}"
    assert f"| gradattention | pcgrad | 0.400 | 0.700 | 0.300 | {overall} | {0.375:.2f} | 1.25 | 3.00 |" in trials
    assert "| rhapsody | gradvac* | – | – | – | – | – | – | – | – |" in trials


def test_the_most_frequent_class_comes_first(out: Path) -> None:
    of = lines(out, "Scores", "gradattention")["most frequent class"]
    known = {column: cell for column, cell in of.items() if cell != "–"}
    assert known == {"method": "most frequent class", "sst accuracy": "0.250", "para accuracy": "0.250"}


def test_seeds_become_mean_and_standard_deviation(out: Path) -> None:
    unitary = lines(out, "Scores", "gradattention")["unitary"]
    assert unitary["seeds"] == "2"
    assert unitary["sst accuracy"] == f"{0.51:.3f} ±{0.02 / math.sqrt(2):.3f}"  # of 0.50 and 0.52
    assert unitary["cosine"] == "–"


def test_a_model_for_each_task_is_scored_in_each_tasks_best_epoch(out: Path) -> None:
    alone = lines(out, "Scores", "gradattention")["single-task"]
    reached = [alone[name] for name in ("sst recall", "para recall", "sts pearson", "average", "best epoch")]
    assert reached == ["0.700", "0.600", "0.700", "0.600", "–"]


def test_incomplete_runs_are_marked(out: Path) -> None:
    assert "attention*" in lines(out, "Scores", "gradattention")
    begun = lines(out, "Scores", "rhapsody")["gradvac*"]
    assert {cell for name, cell in begun.items() if name != "method"} == {"–"}


def test_labels_list_values_that_are_not_the_most_frequent(out: Path) -> None:
    assert list(lines(out, "Scores", "gradattention")) == [
        *(
            "most frequent class",
            "single-task",
            "unitary",
            "unitary, task weights 1/2.3219/1.6094",
            "pcgrad",
            "pcgrad, dropout 0.3",
        ),
        *("pcgrad, suppression 0.3, dropout 0.3", "pcgrad, suppression 0.45, dropout 0.45"),
        *("pcgrad, optimizer gradkern", "attention*"),
    ]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert (
        "states nothing else: task weights none, optimizer adamw, sampling joint, suppression none, dropout 0.1."
        in text
    )


def test_experiments_are_named_by_the_settings_that_differ(tmp_path: Path) -> None:
    for k, lr in enumerate((1e-5, 1e-4)):
        written(tmp_path, surgery(f"a{k}", 100, lr=lr))
    written(tmp_path, surgery("b", 100, scheme="rhapsody"))
    of = experiments(rows(found([tmp_path])))
    assert set(of) == {"gradattention, lr 1e-05", "gradattention, lr 0.0001", "rhapsody"}
    assert [list(labelled(members)) for members in of.values()] == [["unitary"]] * 3


def test_combinations_that_were_not_run_are_dashes(out: Path) -> None:
    ran = f"{1.4 / 3:.3f} / {1.75 / 3:.3f}"
    assert lines(out, "Sampling by method, average / overall", "rhapsody") == {
        "joint": {"sampling by method": "joint", "unitary": ran, "pcgrad": ran},
        "annealed": {"sampling by method": "annealed", "unitary": "–", "pcgrad": ran},
    }
    grid = lines(
        out,
        "Suppression by dropout, average / overall",
        "gradattention, method pcgrad, task weights none, optimizer adamw",
    )
    averages = {p: [of[d].split(" / ")[0] for d in ("0.1", "0.3", "0.45")] for p, of in grid.items()}
    assert averages == {
        "none": [f"{1.4 / 3:.3f}", f"{1.35 / 3:.3f}", "–"],
        "0.3": ["–", f"{1.37 / 3:.3f}", "–"],
        "0.45": ["–", "–", f"{1.355 / 3:.3f}"],
    }


def test_a_grid_needs_two_values_down(suite: Path) -> None:
    made = rows(found([suite]))
    assert [grid.title for grid in grids(made, "sampling", "method")] == ["rhapsody"]
    of_surgery = ["gradattention, method pcgrad, task weights none, optimizer adamw"]
    assert [grid.title for grid in grids(made, "suppression", "dropout")] == of_surgery


def test_time_and_memory_are_relative_to_unitary_scalarization(out: Path) -> None:
    of = lines(out, "Time and memory", "gradattention")
    assert of["unitary"]["× unitary"] == f"1.00 ±{(140 - 100) / 120 / math.sqrt(2):.2f}"
    assert of["pcgrad"]["× unitary"] == f"{150 / 120:.2f}"
    assert of["unitary, task weights 1/2.3219/1.6094"]["× unitary"] == f"{170 / 120:.2f}"  # it is not a baseline itself
    assert of["attention"]["× unitary"] == f"{180 / 120:.2f}"
    assert (of["pcgrad"]["the report's ×"], of["attention"]["the report's ×"]) == ("2.4", "5.41")
    parts = [of["pcgrad"][f"{part}, ms"] for part in ("forward, backward", "surgery", "update", "total")]
    assert parts == ["120", "10", "20", "150"]
    assert (of["pcgrad"]["peak"], of["pcgrad"]["rows"]) == ("112 kB", "3.00")  # 12,000 bytes of 1,000 numbers
    assert of["pcgrad, optimizer gradkern"]["× unitary"] == f"{130 / 120:.2f}"


def test_there_is_no_ratio_without_a_run_with_the_same_other_settings(out: Path) -> None:
    of = lines(out, "Time and memory", "gradattention")
    for label in ("pcgrad, dropout 0.3", "single-task"):  # their dropout or phases differ
        assert (of[label]["× unitary"], of[label]["rows"]) == ("–", "–")
    assert lines(out, "Time and memory", "rhapsody")["pcgrad, sampling annealed"]["× unitary"] == "–"
    others = ("pcgrad, suppression 0.3, dropout 0.3", "pcgrad, optimizer gradkern")
    assert [of[label]["the report's ×"] for label in others] == ["–", "–"]  # the report measured PCGrad without these


def test_runs_are_a_table_of_numbers(out: Path) -> None:
    of = {row["name"]: row for row in table(out, "runs.csv")}
    assert len(of) == 14
    assert float(of["pcgrad"]["step relative to unitary"]) == pytest.approx(1.25, rel=1e-6)  # written in 6 digits
    assert float(of["pcgrad"]["rows over unitary"]) == 3
    assert float(of["unitary-1"]["sst accuracy"]) == pytest.approx(0.52, rel=1e-6)
    assert (of["begun"]["average"], of["begun"]["total ms"], of["begun"]["complete"]) == ("", "", "False")
    assert (of["s0.3"]["suppression"], of["pcgrad"]["suppression"]) == ("0.3", "")


def test_epochs_are_a_table_of_numbers(out: Path) -> None:
    epochs = table(out, "epochs.csv")
    of = [row for row in epochs if row["name"] == "alone"]
    assert [row["phase"] for row in of] == [f"{task} alone" for task in TASKS] * 2
    assert [row["training loss sst"] == "" for row in of] == [False, True, True] * 2
    assert float(of[3]["dev sst accuracy"]) == pytest.approx(0.6, rel=1e-6)  # written in 6 digits
    assert float(of[3]["train sts pearson"]) == pytest.approx(0.75, rel=1e-6)
    assert of[0]["cosine sst-para"] == ""
    assert [row["cosine para-sts"] for row in epochs if row["name"] == "pcgrad"] == ["0.3", "0.3"]


def test_every_figure_is_a_png_that_the_report_shows(out: Path) -> None:
    families = ("gradattention", "gradattention-pcgrad", "rhapsody", "rhapsody-pcgrad")
    by_epoch = [f"{what}-{family}" for what in ("curves", "cosines") for family in families]
    by_epoch.append("curves-gradattention-unitary")  # it has no task gradients
    names = {f"{name}.png" for name in ("scores", "sampling", "suppression", "time", *by_epoch)}
    assert {path.name for path in out.glob("*.png")} == names
    text = (out / "report.md").read_text(encoding="utf-8")
    for name in names:
        assert (out / name).read_bytes().startswith(PNG)
        assert f"]({name})" in text


def panel(figure: Figure, title: str) -> dict[str, tuple[list[float], list[float]]]:
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_are_means_over_seeds_by_epoch(figures: dict[str, Figure]) -> None:
    figure = figures["curves-gradattention"]
    dev, train = (panel(figure, f"sst accuracy, {where}") for where in ("dev", "part of the training set"))
    assert dev["unitary"] == ([1, 2], pytest.approx([0.41, 0.51]))
    assert train["unitary"] == ([1, 2], pytest.approx([0.46, 0.56]))
    assert dev["single-task"] == ([1, 2], pytest.approx([0.5, 0.6]))  # without epochs that trained other tasks
    # The total loss is 3 / k at step k, and each point is the mean of two steps.
    steps, total = panel(figure, "total loss of a batch, mean of 2")["pcgrad"]
    wanted = [(3 / (k - 1) + 3 / k) / 2 for k in range(2, 41)]
    wanted[6] = wanted[7] = math.nan  # step 8 has no finite loss
    assert steps == list(range(2, 41))
    assert total == pytest.approx(wanted, nan_ok=True)


def test_each_method_has_a_line_and_its_variants_have_a_figure(figures: dict[str, Figure]) -> None:
    of = panel(figures["curves-gradattention"], "sts pearson, dev")
    assert list(of) == ["single-task", "unitary", "pcgrad", "attention"]
    of = panel(figures["curves-gradattention-pcgrad"], "sts pearson, dev")
    assert list(of) == [
        *("pcgrad", "pcgrad, dropout 0.3", "pcgrad, suppression 0.3, dropout 0.3"),
        *("pcgrad, suppression 0.45, dropout 0.45", "pcgrad, optimizer gradkern"),
    ]


def test_no_line_leaves_its_panel(figures: dict[str, Figure]) -> None:
    for name in ("curves-gradattention", "cosines-gradattention"):
        for axes in figures[name].axes:
            least, most = axes.get_ylim()
            points = [y for line in axes.lines for y in line.get_ydata() if not math.isnan(y)]
            assert all(least <= y <= most for y in points)


def test_cosines_are_plotted_for_runs_that_have_them(figures: dict[str, Figure]) -> None:
    of = panel(figures["cosines-gradattention"], "mean cosine, all pairs")
    assert "unitary" not in of
    assert of["pcgrad"] == ([1, 2], pytest.approx([0.1, 0.25 / 3]))
    assert panel(figures["cosines-gradattention"], "conflicting pairs")["pcgrad"][1] == pytest.approx([0.25, 0.5])


def test_runs_are_found_once_each_and_errors_name_the_path(suite: Path, tmp_path: Path) -> None:
    assert len(found([suite])) == len(found([suite, suite / "pcgrad", suite / "other"])) == 14
    with pytest.raises(FileNotFoundError, match=r"no run\.json in .*empty"):
        found([suite, tmp_path / "empty"])
    file = written(tmp_path, surgery("cut", 1)) / "run.json"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"cut.run\.json is not valid JSON"):
        found([tmp_path])
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"cut.run\.json lacks name, seed"):
        found([tmp_path])


def test_the_same_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path, surgery(name, 100))
    with pytest.raises(ValueError, match=r"a and .*b are runs with the same settings and seed"):
        rows(found([tmp_path]))


def test_a_task_that_never_had_a_finite_loss_has_no_score(tmp_path: Path) -> None:
    log = [epoch(1, (0.5, 0.5, 0.5), ("sst",), **NONE), epoch(2, (0.5, 0.5, 0.5), ("para",), **NONE)]
    best = {"epoch": None, "average": 0.5, "overall": 0.5, "sst": 0.5, "para": 0.5, "sts": 0.5}
    written(tmp_path, run_json("alone", log, None, 50, 1, method="single-task") | {"best": best})
    (row,) = rows(found([tmp_path]))
    assert (row["para accuracy"], row["sts pearson"]) == (0.5, None)


def test_memory_is_counted_in_gradients_of_the_trained_parameters(tmp_path: Path) -> None:
    written(tmp_path, unitary(0, 100) | {"trained": 250})
    written(tmp_path, surgery("frozen", 100, method="pcgrad", trained=250))
    assert [row["rows over unitary"] for row in rows(found([tmp_path]))] == [0, 12]  # 12,000 bytes of 250 numbers


def test_a_report_needs_an_epoch(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run in .*begun has finished an epoch"):
        report([suite / "other" / "begun"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_best_epoch_may_not_have_trained_all_tasks(tmp_path: Path) -> None:
    written(tmp_path, run_json("few-steps", [epoch(1, (0.5, 0.6, 0.7), ("sst", "para"))], 1, 100, 1))
    (row,) = rows(found([tmp_path]))
    assert row["sts pearson"] == 0.7
