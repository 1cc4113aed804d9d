"""UPGrad and DualProj: exact projections onto the dual cone, however hard the Gramian."""

import math

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import integers, mixed
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import assert_near

CONDITION = 1e-9
each_size = pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
each_class = pytest.mark.parametrize("method", [gk.UPGrad, gk.DualProj])


def regularized(M: Tensor) -> Tensor:
    """G = M / tr M + 1e-4 I, as the authors' code has it."""
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return M / torch.where(trace > 0, trace, 1.0) + 1e-4 * torch.eye(M.shape[-1])


def product(M: Tensor, w: Tensor) -> Tensor:
    return (M @ w.unsqueeze(-1)).squeeze(-1)


@each_size
def test_dual_proj_is_optimal(T: int) -> None:
    """v >= u, Gv >= 0, and one of both is an equation for every task."""
    M = torch.cat((mixed(max(1, 20 // T), T), integers(20, T)))
    v, G = gk.DualProj().weights(M), regularized(M)
    above, slope, size = v - 1 / T, product(G, v), v.abs().sum(-1, keepdim=True)
    assert (torch.minimum(above, slope).abs() / size).max() <= CONDITION


@each_size
def test_up_grad_is_the_sum_of_optimal_projections(T: int) -> None:
    """Each projection is DualProj's with the preference of one task."""
    M = torch.cat((mixed(1, T), integers(5, T)))
    parts = [gk.DualProj([(i == j) / T for j in range(T)]).weights(M) for i in range(T)]
    G = regularized(M)
    for i, v in enumerate(parts):
        above, size = v - torch.eye(T, dtype=torch.float64)[i] / T, v.abs().sum(-1, keepdim=True)
        assert (torch.minimum(above, product(G, v)).abs() / size).max() <= CONDITION
    total = torch.stack(parts).sum(0)
    assert_near(gk.UPGrad().weights(M), total, total.abs().sum(-1, keepdim=True), CONDITION)


@pytest.mark.parametrize("problem", ["conflicting", "duplicate", "zero", "tiny", "huge", "antiparallel"])
@each_class
def test_as_its_twin(method: type, problem: str) -> None:
    twin = {gk.UPGrad: reference.upgrad, gk.DualProj: reference.dualproj}[method]
    for T in range(1, 6):
        torch.manual_seed(T)
        J = PROBLEMS[problem](T, 40)
        for preference in (None, [0.5 + i for i in range(T)], [-1.0 + i for i in range(T)]):
            expected = twin(list(J), preference)
            assert_near(method(preference)(J), expected, T * J.norm(dim=1).max(), CONDITION)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_as_torchjd(name: str, T: int) -> None:
    pytest.importorskip("quadprog")
    peers = pytest.importorskip("torchjd.aggregation")
    M = mixed(1, T, spreads=(0,), ranks=(T, 5 * T))
    preference = torch.rand(T, dtype=torch.float64)
    M = M[M.diagonal(dim1=-2, dim2=-1).sum(-1) > 1e-3]  # below, TorchJD gives the mean
    for given in (None, preference):
        ours, peer = getattr(gk, name)(given).weights(M), getattr(peers, f"{name}Weighting")(given)
        for w, G in zip(ours, M, strict=True):
            assert_near(w, peer(G), w.abs().sum(), 1e-8)  # quadprog's own precision with a condition of 1e4


def test_two_tasks_by_hand() -> None:
    """The projections of (1, 0) and (-1, 1) are (1/2, 1/2) and (0, 1); that of the mean is (0, 1/2)."""
    M = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_near(gk.UPGrad().weights(M) @ J, torch.tensor([0.25, 0.75], dtype=torch.float64), 1.0, 1e-3)  # the ridge
    assert_near(gk.DualProj().weights(M) @ J, torch.tensor([0.0, 0.5], dtype=torch.float64), 1.0, 1e-3)


@each_class
def test_short_gradients_are_treated_as_long_ones_are(method: type) -> None:
    M = gk.gramian(conflicting(4, 9))
    assert_near(method().weights(1e-30 * M), method().weights(M), 1.0, 1e-9)
    assert method().weights(torch.zeros(4, 4)).tolist() == [0.25] * 4


@each_class
def test_absent_tasks_have_no_part(method: type) -> None:
    M = torch.stack([gk.gramian(conflicting(5, 9)) for _ in range(2)])
    present = torch.tensor([True, False, True, True, False])
    some = M[:, present][:, :, present]
    preference = [0.1, 0.2, 0.3, 0.4, 0.5]
    M[:, 1], M[:, :, 1] = math.nan, math.inf  # what one remembers has overflowed
    for given, kept in ((None, None), (preference, [0.1, 0.3, 0.4])):
        w = method(given).solution(M, present).weights
        assert_near(w[:, present], method(kept).weights(some), 1.0, 1e-12)
        assert (w[:, ~present] == 0).all()


@each_class
def test_a_step_with_memory_and_an_absent_task(method: type) -> None:
    J = torch.randn(3, 4, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=1.0), method(), memory=True)
    opt.backward([(J[i] * p).sum() for i in range(3)])
    opt.zero_grad()
    opt.backward([(J[0] * p).sum(), None, (J[2] * p).sum()])
    twin = {gk.UPGrad: reference.upgrad, gk.DualProj: reference.dualproj}[method]
    assert_near(p.grad, twin([J[0], J[2]]), J.abs().sum(0), 1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_class
def test_a_gramian_that_is_not_finite(method: type, bad: float) -> None:
    M = torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    expected = method().weights(M[1])
    M[0, 2, 1] = M[0, 1, 2] = bad
    w = method().weights(M)
    assert w[0].isnan().all()
    assert torch.equal(w[1], expected)


@each_class
def test_a_task_of_no_preference_or_less_is_protected(method: type) -> None:
    """The update raises no loss, up to the ridge, whatever the preference: Jd >= 0."""
    for T in (2, 3, 8):
        J = conflicting(T, 40)
        for preference in ([1.0] + [0.0] * (T - 1), [-1.0] + [1.0] * (T - 1), [-1.0] * T):
            v = method(preference).weights(gk.gramian(J))
            assert (gk.gramian(J) @ v).min() >= -1e-4 * gk.gramian(J).trace() * (1 + v.abs().sum())
    # By hand: the opposite of the gradient of a task with one coordinate of its own raises its loss, and is taken away.
    assert_near(method([1.0, -1.0])(torch.eye(2, dtype=torch.float64)), torch.tensor([1.0, 0.0]).double(), 1.0, 1e-9)


@each_class
def test_preferences_that_are_all_zero_are_refused(method: type) -> None:
    with pytest.raises(ValueError, match=r"preference must hold a number other than 0, got \[0, 0.0\]"):
        method([0, 0.0])


@each_class
def test_as_many_preferences_as_tasks(method: type) -> None:
    with pytest.raises(ValueError, match=r"preference has 2 entries for 3 tasks: \[1.0, 2.0\]"):
        method([1, 2]).weights(torch.eye(3))
