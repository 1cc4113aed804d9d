"""GradDrop: at each entry the gradients of one sign, chosen with the right probability and by the reference's bits."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from gradkern.ops import operators
from gradkern.ops.arguments import Coins, TaskGrads
from gradkern.ops.philox import coins
from tests.problems import conflicting
from tests.tolerances import DTYPES, TOLERANCES, assert_near

HUGE = 2**64 - 3


def signs(J: Tensor, update: Tensor) -> Tensor:
    """Whether the update has the sum of the positive gradients at each entry, rather than that of the negative ones."""
    return (update - J.clamp(min=0).sum(0)).abs() < (update - J.clamp(max=0).sum(0)).abs()


@pytest.mark.parametrize("first", [0, 2**32 - 8, 2**34 - 4, 2**40])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**63 + 5, 2**32 + 7), (HUGE, 2**62)])
def test_the_coins_are_the_references(seed: int, step: int, first: int) -> None:
    stream = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, step - 2**63])
    expected = reference.graddrop_coins(seed, step, first + torch.arange(1001))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(coins(first, 1001, stream, dtype).double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 8, 40])
def test_every_choice_is_the_references(T: int, dtype: torch.dtype, back_end: str) -> None:
    """Bit for bit, from rows of any length: an update is the sum of either sign, and tells which."""
    J = (torch.randn(T, 9001) * 10 ** (3 * torch.rand(T, 1) - 1.5)).to(dtype)
    method = gk.GradDrop(seed=HUGE)
    for step in range(2):
        update = method(J)
        chosen = reference.chosen_signs(list(J), reference.graddrop_coins(HUGE, step, torch.arange(9001)))
        both = (J > 0).any(0) & (J < 0).any(0)  # where there is a choice that shows
        assert T == 1 or both.sum() > 4000
        assert torch.equal(signs(J.double(), update.double())[both], chosen[both])
        expected = reference.graddrop(list(J), 0.0, HUGE, step)
        assert_near(update, expected, J.double().abs().sum(0), TOLERANCES[dtype])


def test_the_probability_is_that_of_the_paper() -> None:
    """Six standard deviations of 200 000 draws for each of some purities, and 0 and 1 exactly."""
    n = 200_000
    for a, b, p in ((3.0, -1.0, 0.75), (1.0, -9.0, 0.1), (2.0, -2.0, 0.5), (1.0, 1.0, 1.0), (-1.0, 0.0, 0.0)):
        J = torch.tensor([[a], [b]]).expand(2, n).contiguous()
        positive = gk.GradDrop(seed=3)(J) > 0
        assert abs(float(positive.double().mean()) - p) <= 6 * math.sqrt(p * (1 - p) / n)


def test_choices_are_independent_of_neighbours_of_steps_and_of_suppression() -> None:
    """Each correlation of 400 000 fair coins is within six standard deviations of 0."""
    n = 400_000
    J = torch.tensor([[1.0], [-1.0]]).expand(2, n).contiguous()
    method = gk.GradDrop(seed=5)
    first, second = method(J), method(J)
    kept = 2.0 * reference.kept(5, 0, 0.5, 1, 0, n) - 1
    others = [second, *(first.roll(k) for k in (1, 2, 3, 4, 8)), kept, gk.GradDrop(seed=6)(J)]
    for other in others:
        assert abs(float((first * other).mean())) <= 6 / math.sqrt(n)


@pytest.mark.parametrize("leak", [0.25, [0.0, 1.0, 0.3]])
def test_a_leak_lets_a_share_pass(leak: float | list[float], back_end: str) -> None:
    J = conflicting(3, 5000)
    expected = reference.graddrop(list(J), leak, 7, 0)
    assert_near(gk.GradDrop(leak, seed=7)(J), expected, J.abs().sum(0), 1e-15)


def test_a_leak_of_one_is_the_sum() -> None:
    J = conflicting(3, 500)
    assert_near(gk.GradDrop(1.0)(J), J.sum(0), J.abs().sum(0), 1e-15)


def test_as_torchjd_in_distribution() -> None:
    """Means and squares over 4 000 updates of each, within six standard deviations of their difference."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    J, leak = conflicting(4, 30), torch.tensor([0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    ours, theirs = gk.GradDrop(leak, seed=1), torchjd.GradDrop(leak=leak)
    a, b = (torch.stack([method(J) for _ in range(4000)]) for method in (ours, theirs))
    for power in (1, 2):
        x, y = a**power, b**power
        spread = ((x.var(0) + y.var(0)) / 4000).sqrt()
        assert ((x.mean(0) - y.mean(0)).abs() <= 6 * spread + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_at_its_entry(value: float, dtype: torch.dtype, back_end: str) -> None:
    J = torch.randn(3, 5000).to(dtype)
    expected = gk.GradDrop(seed=1)(J)
    J[1, ::7] = value
    for leak in (0.0, [0.0, 0.5, 0.0]):
        update = gk.GradDrop(leak, seed=1)(J)
        assert update[::7].isnan().all()
        assert update.isfinite().sum() == 5000 - len(J[0, ::7])
    update = gk.GradDrop(seed=1)(J)
    there = update.isfinite()
    assert torch.equal(update[there], expected[there])


def test_a_row_of_weight_zero_decides_and_is_not_added(back_end: str) -> None:
    """So remembered gradients take part; one that has overflowed counts as zero."""
    J = torch.randn(3, 5000)
    expected = reference.graddrop(list(J), [0.0, 0.5, 0.0], 9, 0, present=[True, True, False])
    coefficients = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, 0.0]])
    out = torch.empty(5000)
    given = Coins([0], torch.tensor([9, -(2**63)]))
    operators.graddrop(TaskGrads(list(J), [0], 1), given, coefficients, [out], None, None)
    assert_near(out, expected, J.abs().sum(0), 1e-6)  # float32
    J[2] = torch.inf
    operators.graddrop(TaskGrads(list(J), [0], 1), given, coefficients, [out], None, None)
    expected = reference.graddrop(list(J[:2]), [0.0, 0.5], 9, 0)
    assert_near(out, expected, J[:2].abs().sum(0), 1e-6)


def test_a_state_of_another_seed_goes_on_there() -> None:
    J = conflicting(3, 500)
    first, second = gk.GradDrop(seed=HUGE), gk.GradDrop(seed=1)
    first(J)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.seed == HUGE
    assert repr(second) == f"GradDrop(leak=0.0, seed={HUGE})"
    assert torch.equal(first(J), second(J))


def test_without_a_seed_torchs_generator_gives_one() -> None:
    seeds = []
    for k in (0, 0, 1):
        torch.manual_seed(k)
        seeds.append(gk.GradDrop().seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_segments_change_nothing() -> None:
    J = conflicting(3, 60)
    assert torch.equal(gk.GradDrop(seed=2)(J, torch.tensor([0, 7, 7, 60])), gk.GradDrop(seed=2)(J))


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        (1.5, r"leak must be .*1\.5"),
        ([0.5, -0.1], r"leak\[1\] must be .*-0\.1"),
        ([0.1, 0.2], "leak has 2 entries for 3"),
    ],
)
def test_a_wrong_leak_is_named(leak: float | Sequence[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.GradDrop(leak)(conflicting(3, 10))


def test_there_is_no_derivative_and_there_are_no_weights() -> None:
    J, method = conflicting(3, 10), gk.GradDrop(seed=1)
    with pytest.raises(ValueError, match=r"J must not require grad, because GradDrop.* pass J\.detach\(\)"):
        method(J.requires_grad_())
    with pytest.raises(TypeError, match=r"GradDrop.* has no weights"):
        method.weights(gk.gramian(J.detach()))
    assert torch.equal(method(J.detach()), gk.GradDrop(seed=1)(J.detach()))  # neither was a step
