"""Calls of operators, methods and modifiers."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import gradkern as gk
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from tests.arguments import values
from tests.arguments.call import Call, Prepared, Wrong, copied

J = torch.arange(30.0).view(3, 10).sin()


def operators() -> Iterator[Call]:
    J_only, offsets = {"J": values.matrices}, {"offsets": values.offsets}
    weights: Wrong = {"w": values.weights_of_matrix, "out": partial(values.outs, torch.empty(10))}
    several: Wrong = {"W": values.weights_of_matrix}
    w, W, right = torch.ones(3), torch.ones(2, 3), {"offsets": torch.tensor([0, 4, 10])}
    yield Call("gramian", lambda: Prepared(gk.gramian, {"J": J}), J_only | offsets)
    yield Call("combine", lambda: Prepared(gk.combine, {"J": J, "w": w}), J_only | weights)
    yield Call("project", lambda: Prepared(gk.project, {"J": J, "W": W}), J_only | several)
    yield Call("combine", lambda: Prepared(gk.combine, {"J": J, "w": w.expand(2, 3)} | right), offsets, "segments")
    yield Call("project", lambda: Prepared(gk.project, {"J": J, "W": W.expand(2, 2, 3)} | right), offsets, "segments")


def losses() -> Iterator[Call]:
    def masks() -> values.Values:
        return [None, 1, True, [True] * 4, torch.ones(4), torch.ones(3, dtype=torch.bool), torch.tensor(True)]

    def of_examples() -> values.Values:
        return [None, 1.0, [1.0] * 4, torch.ones(4, dtype=torch.int64), torch.ones(4).to_sparse(), torch.ones(3)]

    def prepare() -> Prepared:
        right = {"values": torch.ones(4), "present": torch.tensor([True, False, True, True])}
        return Prepared(gk.masked_mean, right)

    yield Call("masked_mean", prepare, {"values": of_examples, "present": masks})


def constructors() -> Iterator[Call]:
    order: Wrong = {"order": values.orders, "reduction": values.strings, "generator": values.generators}
    attention: Wrong = {
        "subset": values.integers,
        "width": values.integers,
        "layers": values.integers,
        "update": values.strings,
        "entropy": values.positive_numbers,
        "lr": values.positive_numbers,
        "generator": values.generators,
    }
    within = partial(_within, values.of_class(gk.Aggregator, none=False))

    def not_negative() -> values.Values:
        return [*values.numbers(), -0.1]

    optional_weights = {"weights": lambda: values.task_weights()[1:]}
    preference = {"preference": values.preferences}
    report: Wrong = {"report": values.flags}
    tasks: Wrong = {"T": values.integers}

    def negative() -> list[Any]:
        return [*values.numbers(), -0.1, -1]

    made: list[tuple[type, dict[str, Any], Wrong]] = [
        (gk.PCGrad, {}, {"partner": values.strings} | order),
        (gk.GradVac, {}, {"beta": values.shares} | order),
        (gk.MGDA, {}, {"normalize": values.strings_or_none}),
        (gk.DBMTL, {}, {"beta": lambda: [*values.shares(), 1]}),
        (gk.MConFIG, {}, {"beta": lambda: [*values.shares(), 1]}),
        (
            gk.MoCo,
            {},
            {"beta": lambda: [*values.shares(), 0]}
            | dict.fromkeys(("beta_sigma", "gamma", "gamma_sigma", "rho"), not_negative),
        ),
        (gk.MoDo, {}, dict.fromkeys(("gamma", "rho"), not_negative)),
        (
            gk.SDMGrad,
            {},
            {
                "lamb": not_negative,
                "lr": values.positive_numbers,
                "momentum": lambda: [*values.shares(), 1],
                "n_iter": values.integers,
            },
        ),
        (gk.Normalized, {"aggregator": gk.MGDA()}, {"aggregator": within, "by": values.strings}),
        (gk.Smoothed, {"aggregator": gk.MGDA()}, {"aggregator": within, "decay": values.shares}),
        (gk.CAGrad, {}, {"c": lambda: [*values.numbers(), -0.5], "rescale": values.flags}),
        (gk.UPGrad, {}, preference),
        (gk.DualProj, {}, preference),
        (gk.PCD, {}, {"tau": values.shares, "beta": lambda: [*values.shares(), 1]}),
        (gk.IMTLG, {}, {}),
        (gk.AlignedMTL, {}, {"scale": values.strings} | preference),
        (gk.ConFIG, {}, {"preference": lambda: [*values.preferences(), [1.0, -0.5], torch.tensor([-1.0])]}),
        (gk.NashMTL, {}, {"max_norm": lambda: values.positive_numbers()[1:], "update_every": values.integers}),
        (gk.FairGrad, {}, {"alpha": values.positive_numbers}),
        (gk.NTKMTL, {}, {"power": lambda: [*values.numbers(), -0.5]}),
        (gk.Krum, {"n_byzantine": 0}, {"n_byzantine": partial(values.integers, 0), "n_selected": values.integers}),
        (gk.RGW, {}, {"generator": values.generators}),
        (gk.GradDrop, {}, {"leak": values.leaks, "seed": partial(values.integers_or_none, 0)}),
        (gk.TrimmedMean, {"k": 1}, {"k": partial(values.integers, 0)}),
        (gk.Sum, {}, optional_weights | report),
        (gk.Mean, {}, report),
        (gk.Constant, {"weights": [1.0, 2.0]}, {"weights": values.task_weights} | report),
        (gk.Uncertainty, {"T": 3}, tasks | report),
        (gk.IMTLL, {"T": 3}, tasks | report),
        (gk.RLW, {}, {"generator": values.generators} | report),
        (gk.GeometricMean, {}, report),
        (gk.DWA, {}, {"temperature": values.positive_numbers, "every": values.integers} | report),
        (gk.STCH, {}, {"mu": values.positive_numbers, "warmup": values.integers} | report),
        (gk.FAMO, {"T": 3}, tasks | {"lr": values.positive_numbers, "decay": negative} | report),
        (gk.GradNorm, {"T": 3}, tasks | {"alpha": negative, "lr": values.positive_numbers} | report),
        (gk.GradAttention, {}, attention),
        (gk.ConflictLR, {}, {"mode": values.strings, "reduce": values.strings}),
        (
            gk.Suppression,
            {"p": 0.5},
            {
                "p": lambda: [*values.shares(), 1],
                "block": values.integers,
                "scope": values.strings,
                "seed": partial(values.integers_or_none, 0),
            },
        ),
        (
            gk.Sketch,
            {},
            {
                "columns": values.integers,
                "seed": partial(values.integers_or_none, 0),
                "report": values.flags,
            },
        ),
    ]
    for cls, right, wrong in made:
        yield Call(cls.__name__, partial(Prepared, cls, right), wrong)
    names = [None, 3, True, b"mgda", ["mgda"], gk.MGDA, "", "adam"]
    yield Call("aggregator", partial(Prepared, gk.aggregator, {"name": "mgda"}), {"name": lambda: names})


def methods() -> Iterator[Call]:
    M = J @ J.T
    gramians: Wrong = {"M": values.gramians}
    of_matrix = {"J": values.matrices, "offsets": values.offsets, "out": partial(values.outs, torch.empty(10))}
    states = {"state_dict": values.loaded_states}
    for name, method in METHODS.items():
        of_losses: Wrong = {"losses": values.losses_of_matrix} if method.losses else {}
        yield Call("Aggregator.forward", partial(_called, method), of_matrix | of_losses, name)
        if type(method.make()).forward is not gk.Aggregator.forward:
            of_second: Wrong = {"second": values.second_batches} if method.second else {}
            call = type(method.make()).forward.__qualname__
            yield Call(call, partial(_called, method), of_matrix | of_second, name)
        yield Call(type(method.make()).load_state_dict.__qualname__, partial(_loading, method), states, name)
    made: list[gk.Aggregator] = [
        gk.PCGrad(),
        gk.GradVac(),
        gk.Sum(),
        gk.Mean(),
        gk.Constant([1.0, 2.0, 3.0]),
        gk.PCD(),
        gk.UPGrad(),
        gk.IMTLG(),
        gk.NashMTL(),
        gk.RGW(),
        gk.DBMTL(),
        gk.MConFIG(),
        gk.MoCo(),
        gk.MoDo(),
    ]
    for aggregator in made:
        kind = type(aggregator).__name__
        yield Call(
            type(aggregator).weights.__qualname__, partial(Prepared, aggregator.weights, {"M": M}), gramians, kind
        )
    for projection in made[:2]:
        call = partial(Prepared, projection.coefficients, {"M": M})
        yield Call("Projection.coefficients", call, gramians, type(projection).__name__)
    yield Call(
        "MGDA.weights",
        partial(Prepared, gk.MGDA("loss").weights, {"M": M, "losses": torch.ones(3)}),
        gramians
        | {
            "losses": values.losses_of_matrix,
        },
    )
    yield Call(
        "Wrapper.weights",
        partial(Prepared, gk.Normalized(gk.MGDA(), "loss").weights, {"M": M, "losses": torch.ones(3)}),
        gramians | {"losses": lambda: [None, 3, "x", [1.0] * 3, torch.ones(2), torch.ones(3).long()]},
    )
    weighting = partial(Prepared, gk.GeometricMean().weights, {"M": M, "losses": torch.ones(3)})
    yield Call("Scalarization.weights", weighting, gramians | {"losses": values.losses_of_matrix}, "losses")
    famo = gk.FAMO(3)
    famo.weights(M, torch.ones(3))
    after = Prepared(famo.after, {"losses": [1.0, 1.0, 1.0]}, lambda: copied(famo.state_dict()))
    yield Call("FAMO.after", lambda: after, {"losses": values.losses_after})
    attention = partial(Prepared, gk.GradAttention(4).weights, {"M": M, "X": torch.ones(3, 4)})
    yield Call(
        "GradAttention.weights",
        attention,
        gramians
        | {
            "X": lambda: [None, 3, "X", [[1.0]], torch.ones(3), torch.ones(2, 4), torch.ones(3, 4).long()],
        },
    )
    yield Call("ConflictLR.scale", partial(Prepared, gk.ConflictLR().scale, {"M": M}), gramians)
    suppression = gk.Suppression(0.5, seed=1)
    loading = Prepared(suppression.load_state_dict, {"state_dict": suppression.state_dict()}, suppression.state_dict)
    yield Call("Suppression.load_state_dict", lambda: loading, states)
    sketch = gk.Sketch(seed=1)
    loading_sketch = Prepared(sketch.load_state_dict, {"state_dict": sketch.state_dict()}, sketch.state_dict)
    yield Call("Sketch.load_state_dict", lambda: loading_sketch, states)
    info = gk.SurgeryInfo(torch.ones(3), M, torch.ones(3))
    tasks = [3, True, "abc", b"abc", [], ["a"], ["a", "b", 3], [None] * 3, {}, torch.ones(3)]
    yield Call("SurgeryInfo.scalars", lambda: Prepared(info.scalars, {"tasks": list("abc")}), {"tasks": lambda: tasks})


def _within(no_methods: values.Values) -> values.Values:
    """Return what no method can be around: no methods, and ones that look at more than the Gramian."""
    return [*no_methods, gk.GradAttention(4), gk.MoCo(), gk.MoDo()]


def _called(row: Method) -> Prepared:
    method = row.make()
    return Prepared(method, {"J": J.clone(), **row.beside(J)}, lambda: copied(method.state_dict()))


def _loading(row: Method) -> Prepared:
    method = row.make()
    method(J, **row.beside(J))
    return Prepared(method.load_state_dict, {"state_dict": method.state_dict()}, lambda: copied(method.state_dict()))
