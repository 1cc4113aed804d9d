"""Tests of ``gk.aggregator`` and of the list of methods: both have every row of METHODS."""

import dataclasses
import inspect
import json

import pytest
import torch

import gradkern as gk
from gradkern import cli
from gradkern.aggregators import listing
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from tests.problems import conflicting

each_name = pytest.mark.parametrize("name", METHODS)


@each_name
def test_every_row_is_made_by_its_name(name: str) -> None:
    for written in (name, name.upper(), name.replace("-", "_"), f" {name.title()} "):
        options = {"seed": 0} if METHODS[name].draws == "signs" else {}
        options |= METHODS[name].arguments if METHODS[name].tasks else {}
        made = gk.aggregator(written, **options)
        assert type(made) is METHODS[name].aggregator
        assert repr(made) == repr(METHODS[name].make(**options))
    assert gk.aggregator(name, **options) is not gk.aggregator(name, **options)


@pytest.mark.parametrize(
    ("name", "needed", "example"),
    [
        *((name, "T", "T=3") for name in ("uncertainty", "imtl-l", "famo", "gradnorm")),
        ("constant", "weights", r"weights=\(1.0, 2.32, 1.61\)"),
        ("krum", "n_byzantine", "n_byzantine=0"),
        ("trimmed-mean", "k", "k=1"),
    ],
)
def test_what_depends_on_the_number_of_tasks_must_be_given(name: str, needed: str, example: str) -> None:
    message = rf"^{needed} must be given for '{name}', as in gradkern.aggregator\('{name}', {example}\) for 3 tasks"
    with pytest.raises(TypeError, match=message):
        gk.aggregator(name)
    assert {row.name for row in METHODS.values() if row.tasks} == {
        "uncertainty",
        "imtl-l",
        "famo",
        "gradnorm",
        "constant",
        "krum",
        "trimmed-mean",
    }


def test_a_rows_example_for_three_tasks_stands_for_nothing() -> None:
    assert repr(gk.aggregator("krum", n_byzantine=1)) == repr(gk.Krum(1))
    assert repr(gk.aggregator("famo", T=5, lr=0.1)) == repr(gk.FAMO(5, lr=0.1))
    assert repr(gk.aggregator("uncertainty", T=2)) == repr(gk.Uncertainty(2))


def test_options_come_before_the_rows_arguments() -> None:
    assert repr(gk.aggregator("pcgrad-random", reduction="mean")) == repr(gk.PCGrad("random", reduction="mean"))
    assert repr(gk.aggregator("pcgrad-random", partner="average")) == repr(gk.PCGrad("average"))
    assert repr(gk.aggregator("mgda", normalize="l2")) == repr(gk.MGDA("l2"))
    J = conflicting(2, 30)
    assert torch.equal(gk.aggregator("Constant", weights=[2.0, 3.0])(J), gk.combine(J, torch.tensor([2.0, 3.0])))


@pytest.mark.parametrize("name", ["NashMTL", "nash_mtl", " Nash-MTL", "IMTLG", "AlignedMTL", "MoCo"])
def test_the_name_of_the_class_is_a_name(name: str) -> None:
    wanted = getattr(gk, name.replace("_", "").replace("-", "").strip(), gk.NashMTL)
    assert type(gk.aggregator(name)) is wanted


def test_an_unknown_name_has_the_names_and_the_closest_one() -> None:
    with pytest.raises(ValueError, match=r"name must be one of sum, mean, .*; got 'pcgrd' \(the closest is 'pcgrad'\)"):
        gk.aggregator("pcgrd")
    with pytest.raises(ValueError, match=r"name must be one of .*; got 'xyzzy'$") as error:
        gk.aggregator("xyzzy")
    assert all(name in str(error.value) for name in METHODS)
    for wrong in (None, 3, b"pcgrad", gk.PCGrad, ["pcgrad"]):
        with pytest.raises(TypeError, match="name must be a string, got "):
            gk.aggregator(wrong)  # type: ignore[arg-type]


@each_name
def test_an_unknown_option_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(TypeError, match=r"^colour is no option of ") as error:
        gk.aggregator(name, colour="red")
    assert all(option in str(error.value) for option in inspect.signature(METHODS[name].aggregator).parameters)


def test_a_wrong_value_of_an_option_is_the_classes_own_error() -> None:
    with pytest.raises(ValueError, match=r"normalize must be .*, got 'l3'"):
        gk.aggregator("mgda", normalize="l3")


def test_methods_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["name", "class", "needs", "passes", "words", "state", "paper"]
    assert [line.split()[0] for line in lines[1 : 1 + len(METHODS)]] == list(METHODS)
    for line, method in zip(lines[1:], METHODS.values(), strict=False):
        assert listing.called(method) in line
        assert (method.paper.author or method.paper.title) in line
    assert printed.endswith(f"\n\n{listing.LEGEND}\n")


def test_methods_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(found) == list(METHODS)
    for name, one in found.items():
        assert one["title"] == METHODS[name].paper.title
        assert bool(one["state"]) == METHODS[name].state
    # Told by hand: what the steps do that README and DESIGN describe.
    assert found["sum"] == found["sum"] | {"needs": [], "passes": "1", "words": "0", "call": "Sum()"}
    assert found["pcgrad-random"] == found["pcgrad-random"] | {
        "call": "PCGrad(partner='random')",
        "needs": ["Gramian"],
        "passes": "T",
        "words": "2T + 1",
        "state": "",
        "paper": "Rhapsody on a Theme of Gradient Surgery",
    }
    assert found["mgda"]["paper"] == "Sener & Koltun 2018"
    assert found["gradvac"]["state"] == "small"
    assert found["gradattention"]["needs"] == ["Gramian", "entries"]


class _Moving(gk.MGDA):
    averages_rows = True


class _Looking(gk.Mean):
    needs_gramian = True


class _OneByOne(gk.MGDA):
    needs_gramian = False
    needs_entries = True


def test_the_cost_follows_from_what_the_class_looks_at() -> None:
    def words(aggregator: type[gk.Aggregator]) -> str:
        return listing.listed(_row(aggregator)).words

    assert words(gk.PCGrad) == "2T + 1"  # the rows twice, and the result
    assert words(_Moving) == "4T + 1"  # and the history read and written
    assert words(gk.MoDo) == "4T + 1"  # and the rows of both batches for their products
    assert listing.listed(_row(gk.MoDo)).passes == "2T"
    assert words(_OneByOne) == "T + 1"  # the rows once, and the result
    assert words(gk.Mean) == "0"
    assert words(_Looking) == "T"  # the rows once, and the result is that of a backward pass
    assert listing.listed(_row(_Looking)).passes == "T + 1"
    assert listing.listed(_row(_Moving)).state == "T for each parameter"
    losses = dataclasses.replace(METHODS["mgda"], arguments={"normalize": "loss"})
    assert listing.listed(losses).needs == ("Gramian", "losses")


def _row(aggregator: type[gk.Aggregator]) -> Method:
    return dataclasses.replace(METHODS["mgda"], aggregator=aggregator)
