"""Weights by Newton's method: they meet their equations, for hard Gramians too."""

import pytest
import torch
from torch import Tensor

from gradkern.aggregators.solvers import fair as solver
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.fair import fair, fair_residual
from tests.aggregators.solvers.hard import T_ALL, distance_of_zero, gramians, mixed
from tests.tolerances import assert_near

solve = carried(fair)


def ridged(M: Tensor) -> Tensor:
    return M + 1e-6 * torch.diag_embed(M.diagonal(dim1=-2, dim2=-1))


def assert_met(M: Tensor, w: Tensor, alpha: float) -> None:
    """Assert that the equations hold, or those with a ridge where 0 is in the hull."""
    zero = M.diagonal(dim1=-2, dim2=-1) == 0
    assert ((w > 0) | zero).all()
    assert (w[zero & ~zero.all(-1, keepdim=True)] == 0).all()
    square = distance_of_zero(M)
    plain, other = fair_residual(M, w, alpha), fair_residual(ridged(M), w, alpha)
    assert plain[square > 1e-11].max() <= 1e-9
    near = square <= 1e-11
    assert torch.where(near, torch.minimum(plain, other), 0.0).max() <= 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("T", T_ALL)
def test_equations(T: int, alpha: float) -> None:
    M = mixed(max(1, 40 // T), T, spreads=(0, 3))
    assert_met(M, solve(M, alpha), alpha)


@pytest.mark.parametrize("T", T_ALL)
def test_nash_for_rows_that_span_twelve_orders_of_magnitude(T: int) -> None:
    M = mixed(max(1, 40 // T), T, spreads=(6,))
    assert_met(M, solve(M), 1.0)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("T", [3, 8, 20])
def test_equations_where_nothing_may_be_read(T: int, alpha: float) -> None:
    M = mixed(1, T, spreads=(0, 3))
    assert_met(M, fair(M, alpha), alpha)


def test_by_hand() -> None:
    """Orthogonal rows: n² w = (s / w)^γ, that is w = (s^γ / n²)^(1 / (1 + γ))."""
    n, s = torch.tensor([1e-3, 1.0, 50.0, 1e3]).double(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    for alpha in (0.5, 1.0, 2.0, 4.0):
        expected = (s ** (1 / alpha) / n**2) ** (alpha / (1 + alpha))
        assert_near(solve(torch.diag(n**2), alpha, s) / expected, torch.ones(4), 1.0, 1e-12)
    assert_near(solve(torch.full((1, 1), 4.0)), torch.tensor([0.5]), 1.0, 1e-14)


def test_two_tasks_of_nash_have_weights_by_their_lengths() -> None:
    """K v = 1 / v with v₁ = v₂: w_i = 1 / (n_i √(1 + φ))."""
    M = gramians("any", 3, 200, 2, 5)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    phi = M[:, 0, 1] / n[:, 0] / n[:, 1]
    expected = 1 / n / (1 + phi).sqrt().unsqueeze(-1)
    assert_near(solve(M) / expected, torch.ones(200, 2), 1.0, 1e-9)


def test_targets() -> None:
    M = gramians("common", 0, 40, 6, 12)
    s = torch.rand(40, 6, dtype=torch.float64) + 0.1
    for alpha in (0.5, 1.0, 2.0):
        w = solve(M, alpha, s)
        assert_near((M @ w.unsqueeze(-1)).squeeze(-1) * (w / s) ** (1 / alpha), torch.ones(40, 6), 1.0, 1e-9)


def test_zero_in_the_hull_gives_the_solution_with_a_ridge() -> None:
    M = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    w = solve(M)
    assert fair_residual(ridged(M), w) <= 1e-12
    assert w[0] * 2 <= 1e3 * (1 + 1e-9)
    assert_near(solve(torch.stack((M, torch.eye(3).double())))[1], torch.ones(3), 1.0, 1e-14)


def test_a_handful_of_rounds_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight for rows of one scale; without the mask of what is done, more rounds still change nothing."""
    M = torch.cat([gramians(kind, 0, 50, 8, 24) for kind in ("any", "common")])
    monkeypatch.setattr(solver, "rounds", lambda K, n: range(8))
    few = fair(M)
    monkeypatch.setattr(solver, "rounds", lambda K, n: range(100))
    assert torch.equal(few, fair(M))
    assert fair_residual(M, few).max() <= 1e-12


def test_float32_gramians() -> None:
    M = mixed(2, 8, spreads=(0, 3)).float()
    for w in (solve(M), fair(M.double())):
        assert w.isfinite().all()
        assert (w >= 0).all()


def test_as_torchjd() -> None:
    pytest.importorskip("scipy")
    from torchjd.aggregation import FairGradWeighting

    for T in (2, 4, 8):
        for alpha in (1.0, 2.0):
            M = gramians("common", 0, 1, T, 3 * T)[0]
            w = solve(M, alpha)
            assert_near(FairGradWeighting(alpha)(M), w, w.max(), 1e-5)  # least_squares stops at 1e-8 of its objective
