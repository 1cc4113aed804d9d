"""Bounded problems: optimal for hard Gramians, as other solvers find, and safe from running in circles."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from gradkern.aggregators.solvers import active_set
from gradkern.aggregators.solvers.active_set import complementary, kkt_residual, nonnegative
from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.scaling import scaled
from gradkern.ops.limits import ACTIVE_SET
from tests.aggregators.solvers.hard import T_ALL, gramians, integers, mixed
from tests.tolerances import assert_near

OPTIMAL = 1e-11
"""Relative to the terms. The last ridge is 2e-14, and the one before 1e-12, at which a few of 40 tasks stop."""

solve = carried(nonnegative)

CIRCLE = torch.tensor([[8.0, -8, -8], [-8, 14, 16], [-8, 16, 19]]).double(), torch.tensor([-4.0, 3, 1]).double()
"""The exchange of all negative tasks runs in circles here."""


def bounded(M: Tensor) -> tuple[Tensor, Tensor]:
    """The problems of UPGrad: T for each Gramian."""
    T = M.shape[-1]
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    G = M / torch.where(trace > 0, trace, 1.0) + 1e-4 * torch.eye(T)
    return G.unsqueeze(-3), G / T


def singular(M: Tensor) -> tuple[Tensor, Tensor]:
    """Problems in the scale of cosines, without a ridge, that have a minimum: p = K c + r with r >= 0."""
    K, _, rows, _ = scaled(M)
    p = (K @ torch.randn_like(K[..., :1])).squeeze(-1)
    return K, torch.where(rows, p + torch.randn_like(p).clamp_min(0), 0.0)


@pytest.mark.parametrize("problems", [bounded, singular])
@pytest.mark.parametrize("T", T_ALL)
def test_optimal(T: int, problems: object) -> None:
    K, p = problems(mixed(max(1, 60 // T), T))  # type: ignore[operator]
    v = solve(K, p)
    assert (v >= 0).all()
    assert kkt_residual(K, p, v).max() <= OPTIMAL


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_thousands_of_small_problems_are_optimal(T: int) -> None:
    K, p = singular(mixed(40, T))
    assert kkt_residual(K, p, solve(K, p)).max() <= OPTIMAL


def test_gradients_without_conflict_need_no_linear_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; many problems, of which none has a negative number, for one matrix. What is not finite stays so."""
    monkeypatch.setattr(active_set, "complementary", None)
    K, p = torch.eye(3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    assert torch.equal(solve(K, p), torch.zeros_like(p))
    p[1, 2] = torch.nan
    assert solve(K, p)[1].isnan().any()


@pytest.mark.parametrize("T", [3, 8, 20])
def test_optimal_where_nothing_may_be_read(T: int) -> None:
    """The same code on tensors, with its fixed number of rounds."""
    for problems in (bounded, singular):
        K, p = problems(mixed(1, T))
        assert kkt_residual(K, p, nonnegative(K, p)).max() <= OPTIMAL


@pytest.mark.parametrize("T", range(1, 7))
def test_as_all_sets_tried_one_by_one(T: int) -> None:
    M = gramians("common", 0, 20, T, 2 * T)
    K = M + torch.eye(T)
    p = torch.randn(20, T, dtype=torch.float64)
    v = solve(K, p)
    for i in range(20):
        best = 0.0
        for free in product([False, True], repeat=T):
            on = torch.tensor(free)
            u = torch.zeros(T, dtype=torch.float64)
            u[on] = -torch.linalg.solve(K[i][on][:, on], p[i][on])
            if (u >= 0).all():
                best = min(best, 0.5 * (u @ K[i] @ u + 2 * p[i] @ u).item())
        assert_near(
            0.5 * v[i] @ K[i] @ v[i] + p[i] @ v[i], torch.tensor(best, dtype=torch.float64), 1 + abs(best), 1e-12
        )


def test_as_quadprog() -> None:
    quadprog = pytest.importorskip("quadprog")
    for T in (2, 8, 20, 40):
        G, q = bounded(gramians("common", 0, 1, T, T))
        V = solve(G, q)[0]
        for i in range(T):
            expected = quadprog.solve_qp(G[0, 0].numpy(), -q[0, i].numpy(), np.eye(T), np.zeros(T))[0]
            assert_near(V[i], torch.from_numpy(expected), np.abs(expected).max() + 1 / T, 1e-9)


def test_an_exchange_that_runs_in_circles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    K, p = CIRCLE
    expected = solve(K, p)
    assert kkt_residual(K, p, expected) <= OPTIMAL
    monkeypatch.setattr(active_set, "_by_ridges", lambda problem, free: torch.full_like(p, torch.nan).numpy())
    monkeypatch.setattr(active_set, "ACTIVE_SET", ACTIVE_SET._replace(plain_rounds=1000))
    assert solve(K, p).isnan().all()


@pytest.mark.parametrize("plain", [1, 3])
def test_the_descent_alone_comes_to_the_same(plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever set the plain rounds leave. Tensors get as many rounds as it needs."""
    K, p = bounded(mixed(2, 5))
    expected = solve(K, p)
    monkeypatch.setattr(active_set, "ACTIVE_SET", ACTIVE_SET._replace(plain_rounds=plain))
    for v in (solve(K, p), nonnegative(K, p)):
        assert_near(v, expected, expected.abs().amax(-1, keepdim=True) + 0.2, 1e-9)


@pytest.mark.parametrize("T", [4, 9, 15, 20])
def test_integer_rows_of_low_rank(T: int) -> None:
    """Many rows are zero, repeated or opposite, so that many sets are singular. Both ways solve all."""
    M = integers(300, T)
    K, _, rows, _ = scaled(M)
    c = torch.randint(-3, 4, (len(M), T, 1)).double()
    p = torch.where(rows, (K @ c).squeeze(-1), 0.0)
    for v in (solve(K, p), nonnegative(K, p)):
        assert kkt_residual(K, p, v).max() <= OPTIMAL


@pytest.mark.parametrize("T", [4, 12, 20, 40])
def test_half_of_the_rounds_suffice(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors get 2T + 16 of them."""
    K, p = singular(torch.cat((integers(60, T), mixed(1, T))))
    monkeypatch.setattr(active_set, "rounds", lambda K, n: range(n // 2 + 6))
    assert kkt_residual(K, p, nonnegative(K, p)).max() <= OPTIMAL


def test_what_is_solved_stays_while_others_are_not() -> None:
    K, p = singular(gramians("any", 0, 30, 3, 9))
    alone = solve(K, p)
    both = solve(torch.cat((K, CIRCLE[0][None] / 8)), torch.cat((p, CIRCLE[1][None] / 8)))
    assert torch.equal(both[:-1], alone)


def test_rows_of_one_matrix_and_many_problems() -> None:
    """K is shared by problems where its dimension is 1."""
    K, p = bounded(gramians("any", 0, 4, 6, 12))
    one_by_one = torch.stack([solve(K[i, 0], p[i, j]) for i in range(4) for j in range(6)])
    assert torch.equal(solve(K, p).flatten(0, 1), one_by_one)


def test_a_problem_without_a_minimum_is_plain_to_see() -> None:
    K, p = torch.ones(2, 2, dtype=torch.float64), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    K[0, 1] = K[1, 0] = -1
    v = solve(K, p)
    assert v.isfinite().all()
    assert v.max() > 1e12


def test_a_gramian_that_rounding_left_indefinite() -> None:
    """Its solution is one with a ridge as large as the rounding, some 1e-7 of a Gramian in float32."""
    M = mixed(4, 8, spreads=(0,))
    K, p = singular(M.float().double())
    for v in (solve(K, p), nonnegative(K, p)):
        assert v.isfinite().all()
        assert kkt_residual(K, p, v).median() <= OPTIMAL
        assert kkt_residual(K, p, v).max() <= 1e-4


def test_a_scale_that_depends_on_the_set() -> None:
    """The v for λ = 2 is the solution for the square that vᵀKv then is; a larger λ gives a larger one."""
    K, p = singular(gramians("any", 0, 5, 6, 12))
    v = nonnegative(K, p - 2)
    R = torch.stack((torch.ones_like(p), -p), -1)
    given = complementary(K, R, p < 2, (v * (K @ v.unsqueeze(-1)).squeeze(-1)).sum(-1))
    assert_near(given, v, 1 + v.abs().max(), 1e-12)
