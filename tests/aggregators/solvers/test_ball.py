"""Vectors in a ball: optimal by their conditions and by duality, for hard Gramians too."""

import pytest
import torch
from torch import Tensor

from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.ball import ball_residual, best_in_ball
from tests.aggregators.solvers.hard import T_ALL, distance_of_zero, gramians, mixed
from tests.tolerances import assert_near

solve = carried(best_in_ball)


def mean(M: Tensor) -> Tensor:
    return torch.full_like(M[..., 0], 1 / M.shape[-1])


def known(M: Tensor) -> Tensor:
    """Return the Gramians that determine ‖g₀‖, which rounding hides where rows nearly cancel."""
    p = mean(M)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    square = (p * (M @ p.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return M[square > 1e-11 * (p * n).sum(-1) ** 2]


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("T", T_ALL)
def test_optimal(T: int, c: float) -> None:
    M = known(mixed(max(1, 60 // T), T, spreads=(0, 3)))
    y = solve(M, mean(M), c)
    assert (y >= 0).all()
    assert ball_residual(M, mean(M), y, c).max() <= 1e-9


@pytest.mark.parametrize("T", T_ALL)
def test_optimal_for_rows_that_span_twelve_orders_of_magnitude(T: int) -> None:
    """Of low rank, a few are off: the numbers of some tasks are small differences there, or the rounds do not end."""
    M = known(mixed(max(1, 60 // T), T, spreads=(6,)))
    y = solve(M, mean(M), 0.4)
    assert y.isfinite().all()
    residual = ball_residual(M, mean(M), y, 0.4)
    assert residual[distance_of_zero(M) > 1e-3].max() <= 1e-9
    assert (residual <= 1e-9).double().mean() >= 0.95


@pytest.mark.parametrize("T", [3, 8, 20])
def test_optimal_where_nothing_may_be_read(T: int) -> None:
    M = known(mixed(1, T, spreads=(0, 3)))
    assert ball_residual(M, mean(M), best_in_ball(M, mean(M), 0.4), 0.4).max() <= 1e-9


@pytest.mark.parametrize("T", [2, 3, 8, 20])
def test_no_better_vector_exists_by_duality(T: int) -> None:
    """min_i g_iᵀd of the vector equals wᵀMp + c‖g₀‖ √(wᵀMw), which bounds it for every w of the simplex."""
    M, c = gramians("common", 0, 50, T, 3 * T), 0.4
    p = mean(M)
    y = solve(M, p, c)
    w = y / y.sum(-1, keepdim=True)
    inner = [(w * (M @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) for x in (p, w)]
    radius = c * (p * (M @ p.unsqueeze(-1)).squeeze(-1)).sum(-1).sqrt()
    bound = inner[0] + radius * inner[1].sqrt()
    worst = (M @ (p + y).unsqueeze(-1)).squeeze(-1).amin(-1)
    assert_near(worst, bound, M.amax((-2, -1)), 1e-12)


def test_small_cases_by_hand() -> None:
    """One row: all of the ball along it. Two orthogonal rows of one length: both alike. No ball: nothing."""
    assert_near(solve(torch.tensor([[9.0]]), torch.ones(1), 0.5), torch.tensor([0.5]), 1.0, 1e-12)
    assert_near(solve(torch.eye(2), mean(torch.eye(2)), 0.5), torch.tensor([0.25, 0.25]), 1.0, 1e-12)
    M = gramians("any", 0, 5, 4, 9)
    assert_near(solve(M, mean(M), 0.0), torch.zeros(5, 4), 1.0, 1e-12)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(solve(opposite, mean(opposite), 0.5), torch.zeros(2, dtype=torch.float64))


def test_weights_of_the_center_other_than_the_mean() -> None:
    M = gramians("any", 3, 40, 5, 12)
    p = torch.rand(40, 5, dtype=torch.float64)
    assert ball_residual(M, p, solve(M, p, 0.7), 0.7).max() <= 1e-9


def test_as_torchjd() -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    from torchjd.aggregation import CAGradWeighting

    for T in (2, 4, 8):
        M = gramians("common", 0, 1, T, 3 * T)
        # 1e-4: TorchJD's solver stops at 1e-8 of the objective, whose minimum is flat
        assert_near((mean(M) + solve(M, mean(M), 0.4))[0], CAGradWeighting(c=0.4)(M[0]), 1.0, 1e-4)
