"""CAGrad: the best vector in the ball, by the stationarity of the paper's problem, its twin and TorchJD."""

import math

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import ROWS, distance_of_zero, gramians, mixed
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import assert_near

CONDITION = 1e-9


def product(M: Tensor, w: Tensor) -> Tensor:
    return (M @ w.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
def test_stationary(T: int, c: float) -> None:
    """f(w) = wᵀMe/T + c‖g₀‖ √(wᵀMw) on the simplex: ∇f_i >= f(w), because ∇fᵀw = f(w). In the scale of unit rows."""
    M = mixed(max(1, 20 // T), T, spreads=(0, 3))
    M = M[(M.diagonal(dim1=-2, dim2=-1) > 0).all(-1)]
    M = M[distance_of_zero(M) > 1e-6]  # no vector lowers all losses in the others
    assert len(M) > 10
    e = torch.full((len(M), T), 1 / T, dtype=torch.float64)
    w = gk.CAGrad(c, rescale=False).weights(M) - e
    assert w.min() >= -1e-12 * w.max()
    w = w / w.sum(-1, keepdim=True)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    K, center, v = M / n.unsqueeze(-1) / n.unsqueeze(-2), n * e, n * w
    base, step = product(K, center), product(K, v)
    radius = c * (center * base).sum(-1, keepdim=True).sqrt()
    slope = base + radius * step / (v * step).sum(-1, keepdim=True).sqrt()
    value = (v * slope).sum(-1, keepdim=True)
    assert ((value / n - slope) / center.sum(-1, keepdim=True)).max() <= CONDITION


@pytest.mark.parametrize("T", [2, 3, 8, 20])
def test_in_the_ball_and_of_no_duality_gap(T: int) -> None:
    """The least gain equals the paper's dual value."""
    M, c = gramians("common", 3, 50, T, 3 * T), 0.5
    e = torch.full((50, T), 1 / T, dtype=torch.float64)
    y = gk.CAGrad(c, rescale=False).weights(M) - e
    square, radius = ((x * product(M, x)).sum(-1) for x in (y, c * e))
    assert_near(square, radius, radius, CONDITION)
    w = y / y.sum(-1, keepdim=True)
    bound = (w * product(M, e)).sum(-1) + (radius * (w * product(M, w)).sum(-1)).sqrt()
    assert_near(product(M, e + y).amin(-1), bound, M.amax((-2, -1)), 1e-12)


@pytest.mark.parametrize("problem", ["conflicting", "duplicate", "zero", "tiny", "huge"])
def test_as_its_twin(problem: str) -> None:
    for T in range(1, 6):
        torch.manual_seed(T)
        J = PROBLEMS[problem](T, 40)
        for c, rescale in ((0.5, True), (0.9, False), (0.0, True)):
            expected = reference.cagrad(list(J), c, rescale)
            # The twin's vector is as near as the best value is flat around it.
            assert_near(gk.CAGrad(c, rescale)(J), expected, J.norm(dim=1).max(), 1e-7)


@pytest.mark.parametrize("kind", ROWS)
def test_as_good_as_its_twin_where_it_is_hard(kind: str) -> None:
    """Both are in the ball, and have the same least gain, whether or not several vectors have it."""
    for T, P, spread in ((2, 1, 0), (2, 6, 3), (3, 2, 3), (4, 3, 0), (4, 12, 3)):
        J = ROWS[kind](torch.randn(1, T, P, dtype=torch.float64))[0]
        J = J * 10 ** (spread * (2 * torch.rand(T, 1, dtype=torch.float64) - 1))
        lengths, mean = J.norm(dim=1), J.mean(0)
        size = mean.norm() + 1e-2 * lengths.mean()  # the square of a shorter mean is rounding by more than 1e-6
        if not (lengths > 0).any():
            continue
        for c in (0.5, 2.0):
            found = (gk.CAGrad(c, rescale=False)(J), reference.cagrad(list(J), c, rescale=False))
            assert max((d - mean).norm() for d in found) <= c * mean.norm() + 1e-6 * size
            gains = [(J @ d)[lengths > 0] for d in found]
            longer = max(lengths[lengths > 0][gain.argmin()] for gain in gains)
            assert_near(gains[0].min(), gains[1].min(), longer * size * (1 + c), 1e-6)


def test_the_twin_of_exactly_opposite_gradients() -> None:
    """By hand: the best vector is orthogonal to both, which gain nothing."""
    g, h = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    assert reference.cagrad([g, -g], 2.0).tolist() == [0, 0]
    assert_near(reference.cagrad([g, -0.5 * g], 2.0), torch.zeros(2), 1.0, 1e-12)
    d = reference.cagrad([g, -g, h], 0.5, rescale=False)  # the mean is h/3: no other vector in the ball is better
    assert d[0].abs() <= 1e-12
    assert 0 < d[1] <= 1.5


@pytest.mark.parametrize("T", [1, 2, 4, 8])
def test_as_torchjd(T: int) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    from torchjd.aggregation import CAGradWeighting

    M = gramians("common", 0, 1, T, 3 * T)[0]
    # 1e-4: TorchJD's solver stops at 1e-8 of the objective, whose minimum is flat
    assert_near(gk.CAGrad(0.4, rescale=False).weights(M), CAGradWeighting(c=0.4)(M), 1.0, 1e-4)


def test_by_hand() -> None:
    """Orthogonal rows of one length: the mean, 1 + c times as long. One row: (1 + c) / (1 + c²). No ball: the mean."""
    eye = torch.eye(2, dtype=torch.float64)
    assert_near(gk.CAGrad(0.5, rescale=False).weights(eye), torch.full((2,), 0.75), 1.0, 1e-12)
    assert_near(gk.CAGrad().weights(eye), torch.full((2,), 0.6, dtype=torch.float64), 1.0, 1e-12)
    assert_near(gk.CAGrad().weights(torch.tensor([[9.0]])), torch.tensor([1.2]), 1.0, 1e-6)
    assert_near(gk.CAGrad(0).weights(gramians("any", 0, 3, 4, 9)), torch.full((3, 4), 0.25), 1.0, 1e-12)


@pytest.mark.parametrize("kind", ["any", "antiparallel", "equal", "integer", "some zero"])
def test_where_no_vector_lowers_all_losses_weights_are_finite(kind: str) -> None:
    for T in (2, 3, 8, 20):
        M = gramians(kind, 3, 40, T, max(1, T // 3))
        assert gk.CAGrad().weights(M).isfinite().all()
    assert gk.CAGrad().weights(torch.zeros(3, 3)).isfinite().all()


def test_absent_tasks_have_no_part() -> None:
    M = torch.stack([gk.gramian(conflicting(5, 9)) for _ in range(2)])
    present = torch.tensor([True, False, True, True, False])
    expected = gk.CAGrad().weights(M[:, present][:, :, present])
    M[:, 1], M[:, :, 1] = math.nan, math.inf  # what one remembers has overflowed
    w = gk.CAGrad().solution(M, present).weights
    assert_near(w[:, present], expected, 1.0, 1e-12)
    assert (w[:, ~present] == 0).all()


def test_a_gramian_that_is_not_finite() -> None:
    M = torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    expected = gk.CAGrad().weights(M[1])
    M[0, 2, 2] = math.inf
    w = gk.CAGrad().weights(M)
    assert w[0].isnan().all()
    assert torch.equal(w[1], expected)


def test_a_negative_radius_is_named() -> None:
    with pytest.raises(ValueError, match=r"c must be a number that is at least 0 and finite, got -0.5"):
        gk.CAGrad(c=-0.5)
