"""PCD: the nearest vector that meets every constraint, and running means that only sound steps move."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import distance_of_zero, gramians, integers, mixed
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import assert_near

CONDITION = 1e-9


def product(M: Tensor, w: Tensor) -> Tensor:
    return (M @ w.unsqueeze(-1)).squeeze(-1)


def optimal(M: Tensor, w: Tensor, tau: float) -> None:
    """In the scale of unit rows: v >= 0, (Kv)_j >= τ, and one of both is an equation for every other task."""
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    assert_near((w * product(M, w)).sum(-1).sqrt() / n[:, 0], torch.ones(len(M)), 1.0, CONDITION)
    v = w * n
    assert v.min() >= 0
    v = v / v[:, :1]
    slack = product(M / n.unsqueeze(-1) / n.unsqueeze(-2), v) - tau
    miss = torch.minimum(slack, v)[:, 1:].abs() / v.sum(-1, keepdim=True)
    assert miss.numel() == 0 or miss.max() <= CONDITION


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
def test_optimal(T: int, tau: float) -> None:
    M = mixed(max(1, 20 // T), T, spreads=(0, 3))
    M = M[(M.diagonal(dim1=-2, dim2=-1) > 0).all(-1)]
    M = M[distance_of_zero(M) > 1e-6]  # all constraints can be met
    assert len(M) > 10
    optimal(M, gk.PCD(tau).weights(M), tau)


@pytest.mark.parametrize("problem", ["conflicting", "duplicate", "zero", "tiny", "huge"])
def test_as_its_twin(problem: str) -> None:
    """Over steps whose gradients get longer and shorter, so that the means matter."""
    for T in range(1, 6):
        torch.manual_seed(T)
        steps = [PROBLEMS[problem](T, 40) * (0.5 + torch.rand(T, 1)) for _ in range(4)]
        for tau, beta in ((0.02, 0.999), (0.3, 0.5), (0.0, 0.0)):
            method = gk.PCD(tau, beta)
            for J, expected in zip(steps, reference.pcd_updates([list(J) for J in steps], tau, beta), strict=True):
                assert_near(method(J), expected, J[0].norm() + 1e-300, 1e-8)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 20])
def test_as_torchjd(T: int) -> None:
    peers = pytest.importorskip("torchjd.aggregation")
    ours, theirs = gk.PCD(), peers.PCDWeighting(eps=0.0)
    for M in gramians("common", 0, 5, T, 3 * T):
        # TorchJD's solver stops at 1e-9 of the Gramian, and divides by its length.
        w = ours.weights(M)
        assert_near(w, theirs(M), w.abs().sum(), 1e-7)


def test_two_tasks_by_hand() -> None:
    """(1, 0) and (-1, 1): without a share to gain, the first row projected onto the plane, as long as before."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_near(gk.PCD(tau=0.0)(J), torch.tensor([0.5, 0.5], dtype=torch.float64) * math.sqrt(2), 1.0, 1e-12)


def test_constraints_that_no_vector_meets_are_dropped() -> None:
    """Two other tasks pull in opposite directions. The update is the first gradient."""
    J = torch.tensor([[1.0, 2.0], [3.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    M = J @ J.T
    for x in (M, M.float()):
        assert gk.PCD().weights(x).tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert_near(gk.PCD(tau=0.0)(J), torch.tensor([0.0, 1.0], dtype=torch.float64) * math.sqrt(5), 1.0, 1e-9)
    peers = pytest.importorskip("torchjd.aggregation")
    assert_near(gk.PCD().weights(M), peers.PCDWeighting()(M), 1.0, 1e-9)


@pytest.mark.parametrize("T", [2, 3, 8, 20])
def test_weights_are_finite_and_the_update_is_no_longer_than_the_first_gradient(T: int) -> None:
    M = torch.cat((mixed(2, T), integers(50, T)))
    w = gk.PCD().weights(M)
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    assert w.isfinite().all()
    total = (w * n).sum(-1)
    assert ((w * product(M, w)).sum(-1) <= n[:, 0].square() + 1e-12 * total.square()).all()
    assert (w[n[:, 0] == 0] == 0).all()


def test_running_means() -> None:
    """m_k = Σ β^(k-j) (1 - β) n_j² / (1 - β^k)."""
    method, beta = gk.PCD(beta=0.9), 0.9
    lengths = torch.rand(6, 3, dtype=torch.float64) + 0.5
    for n in lengths:
        method.weights(torch.diag(n.square()))
    share = beta ** torch.arange(5, -1, -1, dtype=torch.float64)
    expected = (share.unsqueeze(1) * lengths.square()).sum(0) / share.sum()
    assert_near((method.means / method.counts)[0], expected, 1.0, 1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gramian_that_is_not_finite_moves_no_mean(bad: float) -> None:
    method, M = gk.PCD(), torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    method.weights(M)
    before, expected = copy.deepcopy(method.state_dict()), copy.deepcopy(method).weights(M)[1]
    broken = M.clone()
    broken[0, 2, 1] = broken[0, 1, 2] = bad
    w = method.weights(broken)
    assert w[0].isnan().all()
    assert torch.equal(w[1], expected)
    assert all(torch.equal(method.state_dict()[key], before[key]) for key in ("means", "counts"))


def test_absent_tasks_have_no_part_and_their_means_wait() -> None:
    M = torch.stack([gk.gramian(conflicting(5, 9)) for _ in range(2)])
    present = torch.tensor([True, False, True, True, False])
    method, some = gk.PCD(), gk.PCD()
    method.weights(M)
    some.weights(M[:, present][:, :, present])
    before = method.means.clone()
    M = 2 * M
    expected = some.weights(M[:, present][:, :, present])
    M[:, 1], M[:, :, 1] = math.nan, math.inf  # what one remembers has overflowed
    w = method.solution(M, present).weights
    assert_near(w[:, present], expected, 1.0, 1e-9)
    assert (w[:, ~present] == 0).all()
    assert torch.equal(method.means[:, ~present], before[:, ~present])
    assert torch.equal(method.means[:, present], some.means)


@pytest.mark.parametrize("memory", [False, True])
def test_the_first_task_must_be_present(memory: bool) -> None:
    """Nothing has changed then."""
    model, method = nn.Linear(3, 2), gk.PCD()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method, memory=memory)
    opt.backward([x.square() for x in model(torch.ones(3))])
    before = copy.deepcopy(method.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"losses\[0\] must be given in every step with PCD\(tau=0.02, beta=0.999\)"):
        opt.backward([None, model(torch.ones(3))[1].square()])
    assert all(torch.equal(method.state_dict()[key], before[key]) for key in ("means", "counts"))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    opt.backward([model(torch.ones(3))[1].square(), None])


def test_its_state_goes_on_bit_for_bit() -> None:
    steps = [gk.gramian(conflicting(4, 9) * (1 + i)) for i in range(6)]
    whole, first, second = gk.PCD(), gk.PCD(), gk.PCD()
    expected = [whole.weights(M) for M in steps]
    for M in steps[:3]:
        first.weights(M)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(second.weights(M), w) for M, w in zip(steps[3:], expected[3:], strict=True))
    assert second.float().means.dtype == torch.float64
    with pytest.raises(ValueError, match="means of PCD is of 4 tasks in 1 group"):
        second.weights(torch.eye(3))


def test_each_group_has_means_of_its_own() -> None:
    M = torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    both, alone = gk.PCD(), [gk.PCD(), gk.PCD()]
    for scale in (1.0, 3.0, 0.2):
        expected = torch.stack([method.weights(scale * x) for method, x in zip(alone, M, strict=True)])
        assert_near(both.weights(scale * M), expected, 1.0, 1e-12)
