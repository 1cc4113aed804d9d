"""MoCo, DB-MTL and M-ConFIG on Gramians and matrices: their formulas, and what they do with what is hard."""

import importlib.util

import pytest
import torch

import gradkern as gk
from gradkern.aggregators.solvers.simplex import on_simplex
from tests.aggregators.solvers.hard import SPREADS, gramians
from tests.problems import conflicting
from tests.tolerances import assert_near

SIZES = (1, 2, 3, 8, 20, 40)
each_size = pytest.mark.parametrize("T", SIZES)


@each_size
def test_the_nearest_point_of_the_simplex(T: int) -> None:
    """v - w is the same where w > 0, and no larger elsewhere."""
    torch.manual_seed(T)
    v = 3 * torch.randn(100, T, dtype=torch.float64)
    among = torch.rand(100, T) < 0.7
    among[:, 0] = True
    w = on_simplex(v, among)
    assert (w >= 0).all()
    assert (w[~among] == 0).all()
    assert_near(w.sum(-1), torch.ones(100), 1.0, 1e-12)
    difference = torch.where(among, v - w, -torch.inf)
    shift = difference.amax(-1, keepdim=True)
    assert_near(torch.where(w > 0, difference, shift), shift.expand(100, T), 3.0, 1e-12)
    assert_near(torch.from_numpy(on_simplex(v.numpy(), among.numpy())), w, 1.0, 1e-15)
    assert_near(on_simplex(v, None), on_simplex(v, torch.ones_like(among)), 1.0, 1e-15)


@each_size
def test_moco_tends_to_the_shortest_vector(T: int) -> None:
    torch.manual_seed(T)
    J = torch.randn(T, 50, dtype=torch.float64) / 50**0.5
    method = gk.MoCo(beta=1.0, beta_sigma=0.0, gamma=0.3, gamma_sigma=0.0)
    M = J @ J.mT
    for _ in range(2000):
        w = method.weights(M)
    assert_near(w, gk.MGDA().weights(M), 1.0, 1e-9)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", ["any", "nearly antiparallel", "equal", "some zero", "integer"])
@each_size
def test_dbmtls_means_are_all_as_long_as_the_longest(T: int, kind: str, spread: int) -> None:
    torch.manual_seed(T)
    M = gramians(kind, spread, 5, T, 50)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = gk.DBMTL().weights(M) * n
    longest = n.amax(-1, keepdim=True).expand_as(n)
    assert_near(lengths, torch.where(n > 0, longest, 0.0), longest + 1e-300, 1e-12)


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("kind", ["any", "common"])
@each_size
def test_mconfigs_update_has_equal_cosines_with_all_momenta(T: int, kind: str, spread: int) -> None:
    torch.manual_seed(T)
    M = gramians(kind, spread, 5, T, 3 * T)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    w = gk.MConFIG().weights(M)
    products = (M @ w.unsqueeze(-1)).squeeze(-1)
    projections = products / n
    size = (w * n).abs().sum(-1, keepdim=True)
    assert_near(projections, projections[:, :1].expand_as(n), size, 1e-9)
    length = (w * products).sum(-1).sqrt()
    assert_near(length, products.sum(-1) / length, length, 1e-9)


@pytest.mark.parametrize("kind", ["antiparallel", "equal", "some zero", "along a line"])
def test_mconfig_of_degenerate_momenta_is_finite(kind: str) -> None:
    torch.manual_seed(0)
    for T in SIZES:
        M = gramians(kind, 0, 5, T, 50)
        w = gk.MConFIG().weights(M)
        zero = M.diagonal(dim1=-2, dim2=-1) == 0
        assert (w[zero] == 0).all()
        if kind in ("equal", "some zero"):
            assert w.isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("conflictfree") is None, reason="conflictfree is not installed")
def test_mconfig_in_turns_as_the_official_operator() -> None:
    """With one task a step, from the step on in which all have had one; its ``s`` turns the update into Adam's."""
    from conflictfree.grad_operator import ConFIGOperator
    from conflictfree.momentum_operator import PseudoMomentumOperator

    torch.manual_seed(0)
    official = PseudoMomentumOperator(3, beta_2=0.0, gradient_operator=ConFIGOperator())
    method, p = gk.MConFIG(), torch.nn.Parameter(torch.zeros(9))
    for k in range(9):
        g = torch.randn(9)
        p.grad = None
        losses = [(p * g).sum() if t == k % 3 else None for t in range(3)]
        gk.backward(losses, [p], aggregator=method, shared=[p])
        official.calculate_gradient(k % 3, g)
        if k >= 2:
            update = official.fake_m / (1 - 0.9 ** (k - 1))
            assert_near(p.grad, update, update.norm(), 1e-4)


def test_dbmtls_losses_that_have_no_logarithm_are_named_and_move_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    method = gk.DBMTL()
    for shift in (3.0, 4.0):  # losses of 0, and below
        with pytest.raises(ValueError, match=r"losses\[0\] must be above 0, because DB-MTL takes their logarithms"):
            gk.backward([p.sum() - shift, p.square().sum()], [p], aggregator=method)
        assert p.grad is None
        assert "means_float32" not in method.state_dict()


def test_absent_tasks_are_left_out() -> None:
    M = torch.stack([gk.gramian(conflicting(4, 9)) for _ in range(2)])
    present = torch.tensor([True, False, True, True])
    some = M[:, present][:, :, present]
    M[:, 1], M[:, :, 1] = torch.nan, torch.inf
    for make in (gk.DBMTL, gk.MoCo):
        w = make().solution(M, present).weights
        assert (w[:, 1] == 0).all()
        if make is gk.DBMTL:
            assert_near(w[:, present], gk.DBMTL().weights(some), w.max(), 1e-12)
        else:
            assert_near(w.sum(-1), torch.ones(2), 1.0, 1e-12)


def test_mocos_weights_wait_in_a_step_that_is_not_finite() -> None:
    method, M = gk.MoCo(), torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    method.weights(M)
    before, rounds = method.task_weights.clone(), method.rounds.clone()
    M[0, 1, 1] = torch.inf
    w = method.weights(M)
    assert w[0].isnan().all()
    assert w[1].isfinite().all()
    assert torch.equal(method.task_weights, before)
    assert torch.equal(method.rounds, rounds)
