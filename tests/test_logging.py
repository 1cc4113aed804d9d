"""Tests of a step's named numbers, of the figures of a run, and of the recipe that makes both."""

import json
from collections.abc import Callable
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("matplotlib", reason="draws the figures")

from matplotlib.figure import Figure

import gradkern as gk
from gradkern import plots
from recipes import log_to_tensorboard as recipe
from tests.models import flat, problem, task_gradients
from tests.step.test_no_host_reads import RefusesReads
from tests.test_package import run as printed_by

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
PAIRS = list(combinations(range(3), 2))
NAMES = ("sst", "para", "sts")
HEADS = tuple(f"heads.{t}.{kind}" for t in range(3) for kind in ("weight", "bias"))

# Rows (3, 0), (-3, 4), (0, 2): lengths 3, 5, 2 and cosines -9/15, 0/6, 8/10.
M = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 25.0, 8.0], [0.0, 8.0, 4.0]], dtype=torch.float64)


def info(gramian: Tensor | None, weights: Tensor, **others: Any) -> gk.SurgeryInfo:
    losses = others.pop("losses", torch.tensor([0.5, 1 / 3, 2.0], dtype=torch.float64))
    return gk.SurgeryInfo(losses, gramian, weights, **others)


def test_the_numbers_of_one_gramian() -> None:
    step = info(
        M,
        torch.tensor([1.5, 1.0, 0.1], dtype=torch.float64),
        attention=torch.tensor([0.25, 0.5, 0.25]),
        targets=torch.arange(9, dtype=torch.float64).reshape(3, 3) / 7,
        kept=torch.tensor(0.75),
        step_scale=torch.tensor(1.1, dtype=torch.float64),
        total_norm=torch.tensor(12.0),
        conflict_agreement=torch.tensor(0.5),
    )
    told = step.scalars()
    # 1/3, 0.1, -0.6, … as Python's own float64 has them, to the last bit.
    assert told == {
        **{"loss/0": 0.5, "loss/1": 1 / 3, "loss/2": 2.0},
        **{"norm/0": 3.0, "norm/1": 5.0, "norm/2": 2.0},
        **{"cosine/0-1": -0.6, "cosine/0-2": 0.0, "cosine/1-2": 0.8},
        "conflict": 1 / 3,
        **{"weight/0": 1.5, "weight/1": 1.0, "weight/2": 0.1},
        **{f"target/{i}-{j}": (3 * i + j) / 7 for i, j in permutations(range(3), 2)},
        **{"attention/0": 0.25, "attention/1": 0.5, "attention/2": 0.25},
        **{"kept": 0.75, "step_scale": 1.1, "total_norm": 12.0, "conflict_agreement": 0.5},
    }
    assert all(type(value) is float for value in told.values())


def test_of_groups_one_number_each() -> None:
    """Give two groups, the second with all signs turned, and a third that no two losses reach."""
    turned = M * torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 4
    targets = torch.stack([torch.full((3, 3), value, dtype=torch.float64) for value in (0.5, 0.25, 9.0)])
    groups = torch.stack([M, turned, torch.zeros(3, 3)])
    w = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 3.0], [1.0, 1.0, 1.0]])
    told = info(groups, w, attention=w / 8, targets=targets).scalars()
    whole = M.numpy() + turned.numpy()  # every norm is √5 times as large, and every cosine (1 - 4)/5 times
    for t in range(3):
        assert told[f"norm/{t}"] == np.sqrt(whole[t, t])
        assert told[f"weight/{t}"] == [1.5, 3.0, 3.0][t]
        assert told[f"attention/{t}"] == [1.5, 3.0, 3.0][t] / 8
    for (i, j), cosine in zip(PAIRS, (-0.6, 0.0, 0.8), strict=True):
        assert told[f"cosine/{i}-{j}"] == pytest.approx(-0.6 * cosine, abs=1e-15)  # some roundings of 1e-16
        assert told[f"target/{i}-{j}"] == told[f"target/{j}-{i}"] == 0.375
    assert told["conflict"] == 2 / 6  # 0-1 in the first group, 1-2 in the second


def test_of_groups_with_names_their_conflict_and_mean_cosine() -> None:
    """The second group has all signs turned, the third no gradients, and the fourth two gradients."""
    turned = M * torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 4
    pair = M * torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    names = ("trunk", 7, ("a", "b"), "")
    told = info(torch.stack([M, turned, torch.zeros(3, 3), pair]), torch.ones(4, 3), groups=names).scalars()
    of_groups = {tag: value for tag, value in told.items() if tag.startswith(("conflict/", "mean_cosine/"))}
    assert of_groups == {
        **{"conflict/trunk": 1 / 3, "conflict/7": 1 / 3, "conflict/(model)": 1.0},
        # Cosines -.6, 0 and .8; .6, 0 and -.8; and -.6. Their sums have some roundings of 1e-16.
        "mean_cosine/trunk": pytest.approx(0.2 / 3, abs=1e-15),
        "mean_cosine/7": pytest.approx(-0.2 / 3, abs=1e-15),
        "mean_cosine/(model)": pytest.approx(-0.6, abs=1e-15),
    }
    without = info(torch.stack([M, turned, torch.zeros(3, 3), pair]), torch.ones(4, 3)).scalars()
    assert without == {tag: value for tag, value in told.items() if tag not in of_groups}


def test_256_groups_have_numbers_of_their_own() -> None:
    names = tuple(f"layer{s}" for s in range(300))
    told = info(M.expand(300, 3, 3), torch.ones(300, 3), groups=names).scalars()
    assert [tag for tag in told if tag.startswith("conflict/")] == [f"conflict/layer{s}" for s in range(256)]
    assert len(told) == 3 + 3 + 3 + 1 + 3 + 2 * 256  # losses, norms, cosines, conflict, weights, groups


def test_groups_of_one_name_as_a_string_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups must have names of their own as strings, got \(1, '1'\)"):
        info(M.expand(2, 3, 3), torch.ones(2, 3), groups=(1, "1")).scalars()


def by_depth(name: str) -> int:
    return int(name.split(".")[1]) // 2


GROUPS: dict[str, tuple[Any, tuple[Any, ...] | None]] = {
    "model": ("model", None),
    "parameter": ("parameter", ("trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias", *HEADS)),
    "module": ("module", ("trunk.0", "trunk.2", "heads.0", "heads.1", "heads.2")),
    "function": (by_depth, (0, 1)),
}


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "attention", "sum"])
@pytest.mark.parametrize("kind", GROUPS)
def test_a_step_names_its_groups(kind: str, method: str) -> None:
    groups, names = GROUPS[kind]
    model, x, y = problem()
    params = list(model.named_parameters())
    step = gk.backward(model.losses(x, y), model, aggregator=METHODS[method](), groups=groups)
    plain = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=0.0), METHODS[method](), groups=groups)
    fused = gk.SurgeryOptimizer(gk.optim.AdamW(params, lr=0.0), METHODS[method](), groups=groups)
    model.trunk[0].requires_grad_(False)  # its groups stay, so that numbers never move
    steps = [step, plain.backward(model.losses(x, y)), fused.update(model.losses(x, y))]
    with plain.accumulate() as total:
        plain.backward(model.losses(x, y))
    for step in (*steps, total.info):
        if method == "sum" or names is None:  # no dimension of groups
            assert step.groups is None
        else:
            assert step.groups == names
            assert len(names) == len(step.gramian) == len(step.weights)


def test_groups_of_parameters_without_names_have_their_places() -> None:
    model, x, y = problem()
    params = list(model.parameters())
    step = gk.backward(model.losses(x, y), params, aggregator=gk.PCGrad(), groups="parameter")
    assert step.groups == tuple(f"params[{k}]" for k in range(len(params)))
    assert {f"conflict/params[{k}]" for k in range(4)} == {tag for tag in step.scalars() if tag.startswith("conflict/")}


def test_the_numbers_of_a_group_are_those_of_its_own_gradients() -> None:
    model, x, y = problem()
    told = gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(), groups="module").scalars(NAMES)
    for name in ("trunk.0", "trunk.2"):
        params = list(model.get_submodule(name).parameters())
        rows = [flat(row, params).numpy() for row in task_gradients(model.losses(x, y), params)]
        cosines = [rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for i, j in PAIRS]
        assert told[f"conflict/{name}"] == np.mean([cosine < 0 for cosine in cosines])
        assert told[f"mean_cosine/{name}"] == pytest.approx(np.mean(cosines), abs=1e-5)  # float32 products
    assert not any(tag.startswith(("conflict/heads", "mean_cosine/heads")) for tag in told)  # no surgery there


METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    "pcgrad": lambda: gk.PCGrad(order=ORDER),
    "gradvac": lambda: gk.GradVac(0.5),
    "attention": lambda: gk.GradAttention(16, 8, 1),
    "sum": gk.Sum,
}


@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_tells_what_its_gradients_are(method: str, groups: str) -> None:
    model, x, y = problem()
    losses = model.losses(x, y)
    trunk = dict(model.trunk.named_parameters())
    grads = task_gradients(losses, list(trunk.values()))
    step = gk.backward(losses, model, aggregator=METHODS[method](), groups=groups)
    told = step.scalars(NAMES)
    kinds = {tag.partition("/")[0] for tag in told}
    beside = {"gradvac": {"target"}, "attention": {"attention"}}.get(method, set())
    beside |= set() if groups == "model" else {"mean_cosine"}
    assert kinds == {"loss", "weight"} | (set() if method == "sum" else {"norm", "cosine", "conflict"} | beside)
    assert [told[f"loss/{name}"] for name in NAMES] == [loss.item() for loss in losses]
    # float32 products and their sums; 1e-5 is some hundred roundings.
    near = {"rel": 1e-5, "abs": 1e-5}
    weights = step.weights.double().numpy()
    if weights.ndim == 2:
        weights = weights[: len(trunk)].mean(0)  # the trunk comes first; heads get no surgery
    assert [told[f"weight/{name}"] for name in NAMES] == pytest.approx(list(weights), rel=1e-15)
    if method == "sum":
        return
    rows = np.stack([flat(row, list(trunk.values())).numpy() for row in grads])
    norms = np.linalg.norm(rows, axis=1)
    assert [told[f"norm/{name}"] for name in NAMES] == pytest.approx(list(norms), **near)
    for i, j in PAIRS:
        cosine = rows[i] @ rows[j] / norms[i] / norms[j]
        assert told[f"cosine/{NAMES[i]}-{NAMES[j]}"] == pytest.approx(cosine, **near)
        assert f"cosine/{NAMES[j]}-{NAMES[i]}" not in told
    ends = np.cumsum([p.numel() for p in trunk.values()])
    parts = [rows] if groups == "model" else np.split(rows, ends[:-1], axis=1)
    assert told["conflict"] == np.mean([part[i] @ part[j] < 0 for part in parts for i, j in PAIRS])
    assert 0 < told["conflict"] < 1


def test_suppression_step_scale_and_norm_are_told() -> None:
    model, x, y = problem()
    inner = gk.optim.AdamW(model.named_parameters())
    opt = gk.SurgeryOptimizer(
        inner, gk.PCGrad(), suppression=gk.Suppression(0.4, scope="all", seed=1), conflict_lr=gk.ConflictLR()
    )
    step = opt.update(model.losses(x, y), max_norm=0.1)
    told = step.scalars()
    for name in ("kept", "step_scale", "total_norm"):
        assert told[name] == getattr(step, name).item()


def test_what_has_no_finite_number_is_left_out() -> None:
    model, x, y = problem()
    losses: list[Tensor | None] = [*model.losses(x, y)]
    losses[1] = None
    absent = gk.backward(losses, model, aggregator=gk.PCGrad(), shared=model.trunk).scalars()
    assert {tag for tag in absent if tag.startswith(("loss", "cosine"))} == {"loss/0", "loss/2", "cosine/0-2"}
    assert absent["norm/1"] == 0
    assert absent["conflict"] == float(absent["cosine/0-2"] < 0)  # of one pair
    overflowed = M.clone()
    overflowed[0, :] = overflowed[:, 0] = torch.inf
    told = info(overflowed, torch.tensor([torch.nan, 1.0, 1.0])).scalars()
    assert {tag for tag in told if not tag.startswith("loss")} == {
        *("norm/1", "norm/2", "cosine/1-2", "conflict", "weight/1", "weight/2")
    }
    assert told["conflict"] == 0
    assert set(info(torch.zeros(2, 2), torch.ones(2), losses=torch.ones(2)).scalars()) == {
        *("loss/0", "loss/1", "norm/0", "norm/1", "weight/0", "weight/1")
    }
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_single_task_has_no_pairs() -> None:
    told = info(torch.tensor([[4.0]]), torch.ones(1), losses=torch.ones(1)).scalars(["only"])
    assert told == {"loss/only": 1.0, "norm/only": 2.0, "weight/only": 1.0}


@pytest.mark.parametrize(
    "tasks", [("a", "b"), ["a", "b", "c", "d"], "abc", b"abc", (1, 2, 3), (), 3, True, {"a", "b", "c"}, torch.ones(3)]
)
def test_names_must_be_one_per_task(tasks: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"tasks must be 3 names, one per task, got ") as raised:
        info(M, torch.ones(3)).scalars(tasks)
    assert str(raised.value).endswith(repr(tasks))


@pytest.mark.parametrize("tasks", [("a", "b", "a"), ("a", "a-b", "b-a")])  # a-b-a would be two pairs
def test_names_must_tell_pairs_apart(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="tasks must make a tag of its own for every pair") as raised:
        info(M, torch.ones(3)).scalars(tasks)
    assert str(raised.value).endswith(repr(tasks))


@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("method", METHODS)
def test_all_numbers_come_in_one_read(
    method: str, groups: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse every read of the device but ``tolist``, and count that: it runs once."""
    model, x, y = problem(device=device)
    step = gk.backward(model.losses(x, y), model, aggregator=METHODS[method](), groups=groups)
    reads = []
    tolist = Tensor.tolist

    def counted(values: Tensor) -> Any:
        reads.append(values.numel())
        with _disable_current_modes():
            return tolist(values)

    def refuse(*args: Any) -> None:
        raise AssertionError("reads the device once more")

    for name in ("numpy", "item", "__bool__", "__float__", "__int__", "__iter__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    monkeypatch.setattr(Tensor, "tolist", counted)
    with RefusesReads():
        told = step.scalars()
    assert len(reads) == 1
    assert reads[0] >= len(told)


def logged(n_tasks: int = 3, steps: int = 47) -> list[dict[str, float]]:
    """Return every seventh step of a run of random numbers. From step 70 on, tasks 0 and 1 never meet."""
    rng = np.random.default_rng(0)
    run = []
    for k in range(steps):
        row = {"step": 7 * k, "lr": 0.1, "conflict": float(rng.random())}
        for i in range(n_tasks):
            row |= {f"norm/t{i}": 1.0, f"weight/t{i}": i + float(rng.random())}
            row |= {f"cosine/t{i}-t{j}": float(rng.uniform(-1, 0.5)) for j in range(i + 1, n_tasks)}
        if k >= 10:
            del row["cosine/t0-t1"]
        run.append(row)
    return run


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of ``window`` values around each one; an even window has one more before it than after."""
    first = [k - window // 2 for k in range(len(values))]
    return [float(np.mean(values[max(0, k) : k + window])) for k in first]


def lines(figure: Figure) -> list[tuple[str, list[float], list[float]]]:
    (axes,) = figure.axes
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_the_cosine_matrix_holds_the_mean_of_every_pair() -> None:
    run = logged(4)
    run.append({"step": 1000, "loss/t0": 1.0})  # a step that overflowed has few numbers
    axes = plots.cosine_matrix(run).axes[0]
    (image,) = axes.images
    shown = image.get_array()
    expected = np.full((4, 4), np.nan)
    for i, j in combinations(range(4), 2):
        values = [row[f"cosine/t{i}-t{j}"] for row in run if f"cosine/t{i}-t{j}" in row]
        assert len(values) == (10 if (i, j) == (0, 1) else 47)
        expected[i, j] = expected[j, i] = sum(values) / len(values)
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), expected, rtol=1e-12)  # sums in another order
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == 12
    for (i, j), mean in np.ndenumerate(expected):
        if i != j:
            assert abs(float(texts[j, i].replace("−", "-")) - mean) <= 0.005 + 1e-9  # two digits
    low, high = image.get_clim()
    assert low == -high
    assert high == pytest.approx(np.nanmax(np.abs(expected)))
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["t0", "t1", "t2", "t3"]


def test_conflict_is_red_agreement_blue_and_next_to_nothing_pale() -> None:
    run = [{"norm/a": 1.0, "norm/b": 1.0, "norm/c": 1.0, "cosine/a-b": -0.8, "cosine/a-c": 0.8, "cosine/b-c": -0.001}]
    axes = plots.cosine_matrix(run).axes[0]
    (image,) = axes.images
    (red, _, blue, _), (blue_red, _, blue_blue, _), pale, *_ = (
        image.to_rgba(np.ma.array([value]))[0] for value in (-0.8, 0.8, -0.001)
    )
    assert red > blue
    assert blue_blue > blue_red
    assert min(pale) > 0.9
    assert {text.get_text() for text in axes.texts} == {"−0.80", "0.80", "0.00"}
    (faint,) = plots.cosine_matrix([run[0] | {"cosine/a-b": 0.02, "cosine/a-c": 0.0}]).axes[0].images
    assert faint.get_clim() == (-0.1, 0.1)


@pytest.mark.parametrize("window", [None, 2, 5, 200])
def test_the_conflict_share_is_smoothed(window: int | None) -> None:
    run = logged()
    del run[20]["conflict"]  # such as a step that overflowed
    there = [row for row in run if "conflict" in row]
    percent = [100 * row["conflict"] for row in there]
    (_, x, raw), (_, x_mean, smooth) = lines(plots.conflict_share(run, window))
    assert x == x_mean == [row["step"] for row in there]
    assert raw == percent
    assert smooth == pytest.approx(running_mean(percent, window or 2), rel=1e-12)  # 47 steps: a twentieth is 2


@pytest.mark.parametrize("n_tasks", [3, 9])
def test_the_weights_have_a_line_for_each_task(n_tasks: int) -> None:
    run = [{tag: value for tag, value in row.items() if tag != "step"} for row in logged(n_tasks)]
    drawn = lines(plots.weights(run, window=5))
    for t in range(n_tasks):
        values = [row[f"weight/t{t}"] for row in run]
        (_, x, raw), (label, x_mean, smooth) = drawn[2 * t : 2 * t + 2]
        assert (label, x, raw) == (f"t{t}", list(range(47)), values)  # without "step", places count
        assert x_mean == x
        assert smooth == pytest.approx(running_mean(values, 5), rel=1e-12)
    figure = plots.weights(run, window=1)
    assert [y for _, _, y in lines(figure)] == [[row[f"weight/t{t}"] for row in run] for t in range(n_tasks)]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [f"t{t}" for t in range(n_tasks)]
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == n_tasks


def test_a_file_of_json_lines_is_a_run(tmp_path: Path) -> None:
    run = logged()
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in run))
    for where in (path, str(path)):
        assert lines(plots.conflict_share(where)) == lines(plots.conflict_share(run))
        assert lines(plots.weights(where)) == lines(plots.weights(run))
        a, b = (plots.cosine_matrix(of).axes[0].images[0].get_array() for of in (where, run))
        np.testing.assert_array_equal(np.ma.filled(a, 9), np.ma.filled(b, 9))


SUM = [{"loss/0": 1.0, "weight/0": 1.0}]


@pytest.mark.parametrize(
    ("draw", "run", "error", "message"),
    [
        (plots.cosine_matrix, SUM, ValueError, "run has no number tagged 'cosine/…'; its tags are loss/0, weight/0"),
        (plots.conflict_share, SUM, ValueError, "run has no number tagged 'conflict'"),
        (plots.weights, [{"loss/0": 1.0}], ValueError, "run has no number tagged 'weight/…'; its tags are loss/0"),
        (plots.weights, [], ValueError, r"run has no steps: \[\]"),
        (plots.weights, SUM[0], TypeError, "run must be a sequence of dicts, .* got {'loss/0'"),
        (plots.weights, 5, TypeError, "run must be a sequence of dicts, .* got 5"),
        (plots.weights, [*SUM, 3], TypeError, r"run\[1\] must be a dict, .* got 3"),
        (plots.weights, [*SUM, {"step": 1, **SUM[0]}], ValueError, "run has a 'step' in some"),
        (
            plots.weights,
            [{"weight/0": "heavy"}],
            ValueError,
            "run has a value that is not a number under 'weight/0' or 'step'",
        ),
    ],
)
def test_bad_runs_are_named(draw: Callable[..., Figure], run: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(run)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"weight/0": 1}\n{"weight/0": ', ValueError, r":2 must be a line of JSON, got '{\"weight/0\": '"),
        ("[1]\n", TypeError, r":1 must be a dict, .* got \[1\]"),
        ("", ValueError, "run has no steps: "),
    ],
)
def test_bad_lines_are_named(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(error, match=message):
        plots.weights(tmp_path / "log.jsonl")


@pytest.mark.parametrize("window", [0, -1, 2.5, True, 2**64])
@pytest.mark.parametrize("draw", [plots.weights, plots.conflict_share])
def test_a_window_is_a_positive_integer(draw: Callable[..., Figure], window: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"window must be an integer.*, got {window}"):
        draw(logged(), window)


def test_matplotlib_is_for_figures_alone() -> None:
    code = """
import sys, gradkern
print([name for name in ("matplotlib", "gradkern.plots") if name in sys.modules])
sys.modules["matplotlib"] = None
try:
    import gradkern.plots
except ImportError as error:
    print(error)
"""
    assert printed_by(code) == '[]\ngradkern.plots needs matplotlib: pip install "gradkern[demo]"'


def test_the_recipe_logs_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    board: list[tuple[str, float, int]] = []

    class Writer:
        """Stand-in for TensorBoard's writer, which need not be installed."""

        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path / "out"

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            board.append((tag, value, step))

        def close(self) -> None:
            board.append(("closed", 0.0, 0))

    monkeypatch.setattr(recipe, "SummaryWriter", Writer)
    monkeypatch.setattr(recipe, "STEPS", 90)
    recipe.main(str(tmp_path / "out"))
    run = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in run] == list(range(0, 90, recipe.LOG_EVERY))
    told = [(tag, value, row["step"]) for row in run for tag, value in row.items() if tag != "step"]
    assert board == [*told, ("closed", 0.0, 0)]
    assert {f"cosine/{a}-{b}" for a, b in combinations(recipe.TASKS, 2)} <= set(run[0])
    for name in ("cosines", "conflict", "weights"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert f"{np.mean([row['conflict'] for row in run]):.0%} of all pairs" in printed
