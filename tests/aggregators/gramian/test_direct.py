"""NTKMTL, Krum and RGW."""

import pytest
import torch

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import gramians, mixed
from tests.problems import PROBLEMS
from tests.tolerances import assert_near


@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
def test_ntkmtl_makes_gradients_equally_long(T: int) -> None:
    M = mixed(1, T)
    square = M.diagonal(dim1=-2, dim2=-1)
    lengths, trace = gk.NTKMTL().weights(M) * square.sqrt(), square.sum(-1, keepdim=True)
    assert_near(lengths, torch.where((square > 0) | (trace == 0), trace.sqrt(), 0.0), trace.sqrt(), 1e-12)
    w = gk.NTKMTL(2.0).weights(M[square.min(-1).values > 0])
    square = square[square.min(-1).values > 0]
    assert_near(w * (square / square.sum(-1, keepdim=True)) ** 2, torch.ones(w.shape), 1.0, 1e-12)


@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_ntkmtl_as_its_twin(problem: str) -> None:
    J = PROBLEMS[problem](5, 30)
    for power in (0.0, 0.5, 1.0):
        expected = reference.ntkmtl(list(J), power)
        assert_near(gk.NTKMTL(power)(J), expected, expected.abs().max(), 1e-9)


@pytest.mark.parametrize("T", [3, 4, 8, 20, 40])
def test_krum_as_its_twin(T: int) -> None:
    for f in {0, T // 4, T - 3}:
        for k in {1, 2, T // 2, T}:
            J = torch.randn(T, 30, dtype=torch.float64) * (1 + torch.rand(T, 1))
            assert_near(gk.Krum(f, k)(J), reference.krum(list(J), f, k), 1.0, 1e-12)


def test_krum_finds_what_is_not_far_off() -> None:
    J = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [-50.0, 3.0], [1.0, 0.2]])
    assert gk.Krum(1).weights(gk.gramian(J)).tolist() == [1, 0, 0, 0, 0]
    assert gk.Krum(1, 4).weights(gk.gramian(J)).tolist() == [0.25, 0.25, 0.25, 0, 0.25]
    M = gramians("equal", 0, 3, 4, 9)
    assert gk.Krum(1).weights(M).tolist() == [[1, 0, 0, 0]] * 3  # the first of equals


def test_krum_with_few_tasks_present() -> None:
    J = torch.tensor([[0.0], [1.0], [1.5], [9.0], [30.0], [31.0]])
    M = gk.gramian(J).unsqueeze(0)

    def chosen(method: gk.Krum, *present: int) -> list[float]:
        return method.solution(M, torch.tensor([t in present for t in range(6)])).weights[0].tolist()

    assert chosen(gk.Krum(3), 0, 1, 2) == [0, 1, 0, 0, 0, 0]
    assert chosen(gk.Krum(3), 4) == [0, 0, 0, 0, 1, 0]
    assert chosen(gk.Krum(0, 4), 2, 5) == [0, 0, 0.5, 0, 0, 0.5]


@pytest.mark.parametrize("T", [3, 5, 9])
def test_krum_as_torchjd_where_sums_and_sums_of_squares_agree(T: int) -> None:
    """A score of one distance is the same order in both, up to which of two equals comes first."""
    peers = pytest.importorskip("torchjd.aggregation")
    for _ in range(10):
        M = gk.gramian(torch.randn(T, 30, dtype=torch.float64))
        assert torch.equal(gk.Krum(T - 3, 2).weights(M), peers.KrumWeighting(T - 3, 2)(M))


@pytest.mark.parametrize(("n_byzantine", "n_selected"), [(0, 1), (1, 2), (3, 3)])
def test_krum_in_steps_with_absent_tasks(n_byzantine: int, n_selected: int) -> None:
    """A remembered gradient of an absent task is neither near to another one nor selected: as the twin without it."""
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0), gk.Krum(n_byzantine, n_selected), memory=True)
    for absent in ((), (1,), (0, 4), (2, 3, 5), (), (0, 1, 2, 3, 4)):
        J = torch.randn(6, 9, dtype=torch.float64)
        opt.zero_grad()
        info = opt.backward([None if t in absent else (p * g).sum() for t, g in enumerate(J)])
        grads = [g for t, g in enumerate(J) if t not in absent]
        # Of fewer than n_byzantine + 3 a score is one distance, and of one alone there is none.
        expected = grads[0] if len(grads) == 1 else None
        if expected is None:
            expected = reference.krum(grads, min(n_byzantine, len(grads) - 3), min(n_selected, len(grads)))
        assert p.grad is not None
        assert_near(p.grad, expected, J.norm(), 1e-12)
        assert (info.weights[list(absent)] == 0).all()


def test_krum_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="n_byzantine must be at most T - 3 = 1 for 4 tasks, got 2"):
        gk.Krum(2)(torch.randn(4, 9))
    with pytest.raises(ValueError, match="n_selected must be at most T = 4, got 5"):
        gk.Krum(1, 5)(torch.randn(4, 9))


def test_rgw_draws_the_softmax_of_normal_numbers() -> None:
    torch.manual_seed(1)
    w = gk.RGW().weights(torch.eye(4).expand(20000, 4, 4))
    assert_near(w.sum(-1), torch.ones(20000), 1.0, 1e-6)
    x = w.double().log()
    x = x - x.mean(-1, keepdim=True)
    assert_near(x.mean(0), torch.zeros(4), 1.0, 0.03)  # four standard deviations
    assert_near(x.mT @ x / 20000, torch.eye(4) - 0.25, 1.0, 0.04)


def test_rgw_of_absent_tasks_and_of_segments() -> None:
    w = gk.RGW().solution(torch.eye(4).expand(3, 4, 4), torch.tensor([True, False, True, True])).weights
    assert (w[:, 1] == 0).all()
    assert_near(w.sum(-1), torch.ones(3), 1.0, 1e-6)
    J, offsets = torch.randn(3, 10), torch.tensor([0, 4, 10])
    torch.manual_seed(7)
    expected = gk.combine(J, gk.RGW().weights(gk.gramian(J, offsets)), offsets)
    torch.manual_seed(7)
    assert_near(gk.RGW()(J, offsets), expected, 1.0, 1e-5)


def test_rgw_names_a_generator_that_is_elsewhere() -> None:
    with pytest.raises(ValueError, match="generator is on cpu, M on meta"):
        gk.RGW(torch.Generator()).weights(torch.eye(3, device="meta"))
