"""The trimmed mean: the mean of what is left at each entry, however large what is left out is."""

import math

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from tests.problems import conflicting
from tests.tolerances import DTYPES, TOLERANCES, assert_near

SIZES = [(1, 0), (2, 0), (3, 1), (5, 1), (8, 3), (9, 4), (20, 1), (40, 7)]
"""T and k: nothing left out, a median, and the last row of a quad."""


def left(J: Tensor, k: int) -> Tensor:
    """The entries that are left, in ascending order."""
    return J.double().sort(0).values[k : len(J) - k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "k"), SIZES)
def test_the_mean_of_what_is_left(T: int, k: int, dtype: torch.dtype, back_end: str) -> None:
    J = (torch.randn(T, 4500) * 10 ** (2 * torch.rand(T, 1) - 1)).to(dtype)
    scale = left(J, k).abs().sum(0)
    assert_near(gk.TrimmedMean(k)(J), left(J, k).mean(0), scale, TOLERANCES[dtype])
    assert_near(reference.trimmed_mean(list(J), k), left(J, k).mean(0), scale, 1e-14)


@pytest.mark.parametrize("kind", ["equal", "integers", "zeros", "antiparallel"])
def test_equal_entries(kind: str, back_end: str) -> None:
    J = torch.randn(5, 5000, dtype=torch.float64)
    if kind == "equal":
        J[1:3] = J[0]
    elif kind == "integers":
        J = torch.randint(-2, 3, (5, 5000)).double()
    elif kind == "zeros":
        J[:2] = 0
    else:
        J[1], J[3] = -J[0], -J[2]
    for k in (1, 2):
        assert_near(gk.TrimmedMean(k)(J), left(J, k).mean(0), left(J, k).abs().sum(0), 1e-15)


def test_what_is_left_out_rounds_nothing_off(back_end: str) -> None:
    """Outliers of 1e30 beside entries of 1, in float32, in any rows."""
    J = torch.randn(6, 5000)
    expected = J[1:5].double().sort(0).values.mean(0)
    J[0], J[5] = 1e30, -1e30
    for order in (range(6), (5, 1, 0, 2, 3, 4), (1, 2, 3, 4, 5, 0)):
        assert_near(gk.TrimmedMean(1)(J[list(order)]), expected, J[1:5].abs().sum(0), 1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_at_its_entry(value: float, back_end: str) -> None:
    J = torch.randn(5, 5000)
    expected = gk.TrimmedMean(1)(J)
    J[2, ::7] = value
    update = gk.TrimmedMean(1)(J)
    there = update.isfinite()
    assert (~there).sum() == len(J[0, ::7])
    assert update[::7].isnan().all()
    assert torch.equal(update[there], expected[there])


def test_as_torchjd() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    for T, k in SIZES:
        J = conflicting(T, 300)
        assert_near(gk.TrimmedMean(k)(J), torchjd.TrimmedMean(k)(J), left(J, k).abs().sum(0), 1e-15)


def test_a_row_of_weight_zero_is_counted_and_not_added(back_end: str) -> None:
    """So remembered gradients take part; one that has overflowed counts as zero."""
    J = torch.randn(6, 5000, dtype=torch.float64)
    present = [True, False, True, True, False, True]
    weights, out = torch.tensor(present).double(), torch.empty(5000, dtype=torch.float64)
    for k in (0, 1, 2):
        operators.trimmed_mean(TaskGrads(list(J), [0], 1), k, weights, [out], None, None)
        assert_near(out, reference.trimmed_mean(list(J), k, present), J.abs().sum(0), 1e-15)
    J[4] = torch.nan
    operators.trimmed_mean(TaskGrads(list(J), [0], 1), 1, weights, [out], None, None)
    J[4] = 0
    assert_near(out, reference.trimmed_mean(list(J), 1, present), J.abs().sum(0), 1e-15)


@pytest.mark.parametrize(("T", "k"), [(1, 1), (2, 1), (4, 2), (3, 7)])
def test_something_must_be_left(T: int, k: int) -> None:
    message = f"k must be below half of the number of tasks that have gradients, {T}, got {k}"
    out = torch.full((10,), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        gk.TrimmedMean(k)(conflicting(T, 10), out=out)
    assert out.isnan().all()


def test_segments_change_nothing() -> None:
    J = conflicting(3, 60)
    assert torch.equal(gk.TrimmedMean(1)(J, torch.tensor([0, 7, 7, 60])), J.median(0).values)
