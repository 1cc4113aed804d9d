"""Shortest vectors of hulls, for hard Gramians and of shifted rows; ``test_mgda.py`` has more."""

from itertools import product

import pytest
import torch

from gradkern.aggregators.solvers.arrays import carried
from gradkern.aggregators.solvers.min_norm import min_norm, shifted, shortfall
from tests.aggregators.solvers.hard import T_ALL, gramians, integers, mixed
from tests.tolerances import assert_near

solve = carried(min_norm)


@pytest.mark.parametrize("T", T_ALL)
def test_optimal(T: int) -> None:
    M = mixed(max(1, 60 // T), T)
    w = solve(M)
    assert (w >= 0).all()
    assert_near(w.sum(-1), torch.ones(len(M)), 1.0, 1e-14)
    assert shortfall(M, w).max() <= 1e-11  # as the active set's


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_thousands_of_small_problems_are_optimal(T: int) -> None:
    M = mixed(40, T)
    assert shortfall(M, solve(M)).max() <= 1e-11


@pytest.mark.parametrize("T", [3, 8, 20])
def test_optimal_where_nothing_may_be_read(T: int) -> None:
    M = torch.cat((mixed(1, T), integers(300, T)))
    assert shortfall(M, min_norm(M)).max() <= 1e-11


def test_exchanges_that_run_in_circles_for_long() -> None:
    """Twelve rows of rank 5, some of them zero. Exchanges of all negative tasks, or of one, took 53 rounds."""
    J = torch.zeros(12, 5, dtype=torch.float64)
    J[2:5] = torch.tensor([[-1, -3, 1, -1, 1], [2, 3, -1, 0, 0], [0, 0.02, 0.03, 0.04, -0.01]])
    J[6:10] = torch.tensor([[-1, 0, 0, 0, 0], [0, 0, -1, 0, 0], [-1, -2, 0, -2, 1], [4, 0, 0, 0, 3]])
    J[10:] = torch.tensor([[-0.04, -0.04, 0, 0.03, -0.01], [0, 1, 2, -1, 1]])
    M = J @ J.T
    for way in (solve, min_norm):
        assert shortfall(M, way(M)) <= 1e-13


@pytest.mark.parametrize("T", range(1, 6))
def test_as_all_faces_tried_one_by_one(T: int) -> None:
    """The shortest vector of the hull of shifted rows minimises ½ wᵀMw + qᵀMw."""
    M = gramians("any", 0, 20, T, 2 * T)
    q = torch.randn(20, T, dtype=torch.float64)
    p = (M @ q.unsqueeze(-1)).squeeze(-1)
    w = solve(shifted(M, q))
    for i in range(20):
        best = torch.inf
        for free in product([False, True], repeat=T):
            if not any(free):
                continue
            on = torch.tensor(free)
            edge = torch.ones(sum(free), 1, dtype=torch.float64)
            bordered = torch.cat((torch.cat((M[i][on][:, on], edge), 1), torch.cat((edge.T, torch.zeros(1, 1)), 1)))
            u = torch.linalg.solve(bordered, torch.cat((-p[i][on], torch.ones(1, dtype=torch.float64))))[:-1]
            if (u >= -1e-12).all():
                best = min(best, (0.5 * u @ M[i][on][:, on] @ u + p[i][on] @ u).item())
        value = 0.5 * w[i] @ M[i] @ w[i] + p[i] @ w[i]
        assert_near(value, torch.tensor(best, dtype=torch.float64), M[i].max() + p[i].abs().max(), 1e-12)


def test_shifted_rows() -> None:
    J, q = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    K = J + q @ J
    assert_near(shifted(J @ J.T, q), K @ K.T, (K @ K.T).max(), 1e-13)


def test_few_dimensions_and_many_rows_within_the_rounds_of_a_device() -> None:
    """The rows span five dimensions, so that sets of free tasks are singular, and exchanges of many tasks circle."""
    J = torch.tensor(
        [
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [-1, -3, 1, -1, 1],
            [2, 3, -1, 0, 0],
            [0, 2, 3, 4, -1],
            [0, 0, 0, 0, 0],
            [-1, 0, 0, 0, 0],
            [0, 0, -1, 0, 0],
            [-1, -2, 0, -2, 1],
            [4, 0, 0, 0, 3],
            [-4, -4, 0, 3, -1],
            [0, 1, 2, -1, 1],
        ],
        dtype=torch.float64,
    )
    J[[4, 10]] /= 100
    M = J @ J.mT
    assert shortfall(M, min_norm(M)).max() <= 1e-9
