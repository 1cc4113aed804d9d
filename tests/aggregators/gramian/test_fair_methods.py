"""Nash-MTL and FairGrad: their equations, the cut, and weights that serve several steps."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import ROWS, distance_of_zero, gramians, mixed
from tests.problems import conflicting
from tests.tolerances import assert_near

CONDITION = 1e-9
each_size = pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])


def hard(T: int) -> Tensor:
    """Gramians of all kinds, hulls with 0 in them left out."""
    M = mixed(max(1, 20 // T), T, spreads=(0, 3))
    return M[(distance_of_zero(M) > 1e-11) & (M != 0).flatten(1).any(-1)]


def assert_solved(M: Tensor, w: Tensor, gamma: float) -> None:
    """M w w^γ = 1, relative to the terms; rows of zeros have the weight 0."""
    zero = M.diagonal(dim1=-2, dim2=-1) == 0
    assert ((w > 0) | zero).all()
    gain, terms = ((X @ w.unsqueeze(-1)).squeeze(-1) * w**gamma for X in (M, M.abs()))
    assert torch.where(zero, 0.0, (gain - 1).abs() / (1 + terms)).max() <= CONDITION


@each_size
def test_nash_equations(T: int) -> None:
    M = hard(T)
    assert_solved(M / M.norm(dim=(-2, -1), keepdim=True), gk.NashMTL(None).weights(M), 1.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
@each_size
def test_fairgrad_equations(T: int, alpha: float) -> None:
    M = hard(T)
    assert_solved(M, gk.FairGrad(alpha).weights(M), 1 / alpha)


@pytest.mark.parametrize("T", [1, 2, 4])
def test_as_the_twins(T: int) -> None:
    J = torch.randn(T, 30, dtype=torch.float64) * torch.logspace(-2, 1, T).unsqueeze(-1)
    for alpha in (0.5, 1.0, 3.0):
        expected = reference.fairgrad(list(J), alpha)
        assert_near(gk.FairGrad(alpha)(J), expected, expected.norm(), 1e-9)
    for max_norm in (None, 1e-3, 1.0, 1e3):
        expected = reference.nash_mtl(list(J), max_norm)
        assert_near(gk.NashMTL(max_norm)(J), expected, expected.norm(), 1e-9)


@pytest.mark.parametrize("kind", ROWS)
def test_as_the_twins_where_it_is_hard(kind: str) -> None:
    """Also without a solution, where both add the same ridge. Relative to the terms of the update, which cancel."""
    for T, P, spread in ((2, 1, 0), (2, 6, 3), (3, 3, 3), (4, 2, 0), (4, 12, 3)):
        J = torch.linalg.eigh(gramians(kind, spread, 1, T, P)[0])
        J = J.eigenvectors * J.eigenvalues.clamp(min=0).sqrt()
        J[J.norm(dim=1) < 1e-7] = 0  # rows of zero, up to rounding
        for method, twin in (
            (gk.NashMTL(None), partial(reference.nash_mtl, max_norm=None)),
            (gk.FairGrad(), reference.fairgrad),
            (gk.FairGrad(2.0), partial(reference.fairgrad, alpha=2.0)),
        ):
            w = method.weights(gk.gramian(J))
            assert_near(w @ J, twin(list(J)), (w * J.norm(dim=1)).sum() + (J == 0).all(), 1e-7)


def test_by_hand() -> None:
    """Orthogonal rows: n² w = w^(-1/α); Nash's M is divided by ‖M‖ = √(2⁴ + 3⁴) first."""
    M = torch.diag(torch.tensor([4.0, 9.0]).double())
    assert_near(gk.FairGrad().weights(M), 1 / torch.tensor([2.0, 3.0]).double(), 1.0, 1e-12)
    assert_near(gk.FairGrad(2.0).weights(M), torch.tensor([4.0, 9.0]).double() ** (-2 / 3), 1.0, 1e-12)
    assert_near(gk.NashMTL(None).weights(M), 97**0.25 / torch.tensor([2.0, 3.0]).double(), 1.0, 1e-12)
    assert_near(gk.NashMTL(3.0).weights(M), 3 / 2**0.5 / torch.tensor([2.0, 3.0]).double(), 1.0, 1e-12)


def test_the_cut_is_of_each_group() -> None:
    M = torch.stack([gk.gramian(s * conflicting(4, 30)) for s in (1e-3, 1e3)])
    w, uncut = gk.NashMTL(0.5).weights(M), gk.NashMTL(None).weights(M)
    assert torch.equal(w[0], uncut[0])
    assert_near((w[1] @ M[1] @ w[1]).sqrt(), torch.tensor(0.5), 1.0, 1e-9)
    assert_near(w[1] / uncut[1], (w[1, :1] / uncut[1, :1]).expand(4), w[1, 0] / uncut[1, 0], 1e-9)


def test_zero_in_the_hull_has_finite_weights() -> None:
    g = torch.randn(9, dtype=torch.float64)
    M = gk.gramian(torch.stack((g, -3 * g, torch.zeros_like(g))))
    ridged = M + 1e-6 * torch.diag(M.diagonal())
    w = gk.FairGrad().weights(M)
    assert_near(w * (ridged @ w), torch.tensor([1.0, 1.0, 0.0]), 1.0, 1e-9)
    assert gk.NashMTL().weights(M).isfinite().all()


def series(n: int) -> list[Tensor]:
    return [gk.gramian(conflicting(3, 20)) for _ in range(n)]


def test_weights_serve_as_many_steps_as_said() -> None:
    steps, method, plain = series(7), gk.NashMTL(None, 3), gk.NashMTL(None)
    for k, M in enumerate(steps):
        assert_near(method.weights(M), plain.weights(steps[k // 3 * 3]), 10.0, 1e-12)
    assert plain.state_dict().keys() == {"_extra_state"}
    assert plain.last is None


def test_kept_weights_are_cut_by_the_gramian_of_their_step() -> None:
    method, M = gk.NashMTL(1.0, 2), series(1)[0]
    method.weights(M)
    w = method.weights(100 * M)
    assert_near((w @ (100 * M) @ w).sqrt(), torch.tensor(1.0), 1.0, 1e-9)


def test_a_gramian_that_is_not_finite_leaves_the_state_of_all_groups() -> None:
    """A gradient scaler skips the whole step."""
    method = gk.NashMTL(None, 3)
    bad = torch.full((3, 3), torch.inf, dtype=torch.float64)
    assert method.weights(torch.stack((bad, series(1)[0])))[0].isnan().all()
    assert method.age is not None
    assert method.age.tolist() == [[0.0] * 3] * 2
    M = torch.stack(series(2))
    assert torch.equal(method.weights(M), gk.NashMTL(None).weights(M))
    before = copy.deepcopy(method.state_dict())
    method.weights(torch.stack((bad, bad)))
    assert all(torch.equal(before[name], method.state_dict()[name]) for name in ("last", "age"))


def test_an_overflow_under_a_scaler_leaves_the_state() -> None:
    p = torch.nn.Parameter(torch.ones(9))
    method, scaler = gk.NashMTL(update_every=2), torch.amp.GradScaler("cpu", init_scale=2.0)
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.1), method)
    J = torch.randn(3, 9)
    opt.update([scaler.scale((p * g).sum()) for g in J], scaler=scaler)
    scaler.update()
    before = copy.deepcopy(method.state_dict())
    J[1, 2] = torch.inf
    opt.update([scaler.scale((p * g).sum()) for g in J], scaler=scaler)
    assert all(torch.equal(before[name], method.state_dict()[name]) for name in ("last", "age"))


def test_state_goes_on_where_it_was_saved() -> None:
    steps, first = series(8), gk.NashMTL(1.0, 3)
    for M in steps[:4]:
        first.weights(M)
    for second in (gk.NashMTL(1.0, 3), copy.deepcopy(first)):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        again = copy.deepcopy(first)
        for M in steps[4:]:
            assert torch.equal(again.weights(M), second.weights(M))
    assert first.float().last is not None
    assert first.last is not None
    assert first.last.dtype == torch.float64
    first.load_state_dict(gk.NashMTL().state_dict())
    assert first.last is None


def test_a_task_without_a_weight_makes_new_ones_due() -> None:
    method, M = gk.NashMTL(None, 5), torch.stack(series(1))
    method.solution(M, torch.tensor([True, False, True]))
    some = method.solution(2 * M, torch.tensor([True, False, False])).weights
    assert some[0, 0] > 0
    assert (some[0, 1:] == 0).all()
    other = gk.gramian(conflicting(3, 20)).unsqueeze(0)
    assert torch.equal(method.solution(other, None).weights, gk.NashMTL(None).weights(other))


def test_other_tasks_and_states_are_named() -> None:
    method = gk.NashMTL(update_every=2)
    method.weights(series(1)[0])
    state = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"last of NashMTL is of 3 tasks in 1 group\(s\), and this step has 2 tasks"):
        method.weights(torch.eye(2))
    one = torch.ones(1, 3)
    for last, age in ((torch.ones(1, 4), one), (torch.ones(3), one), (-one, one), (one, -one), (one, one.long())):
        with pytest.raises((TypeError, ValueError), match="in state_dict"):
            method.load_state_dict({**state, "last": last, "age": age})
    assert torch.equal(method.state_dict()["last"], state["last"])


@pytest.mark.parametrize("T", [2, 4, 8])
def test_fairgrad_as_torchjd(T: int) -> None:
    pytest.importorskip("scipy")
    from torchjd.aggregation import FairGradWeighting

    M = gramians("common", 0, 1, T, 3 * T)[0]
    for alpha in (1.0, 2.0):
        w = gk.FairGrad(alpha).weights(M)
        assert_near(FairGradWeighting(alpha)(M), w, w.max(), 1e-5)  # least_squares stops at 1e-8 of its objective


@pytest.mark.parametrize("T", [2, 4])
def test_nash_as_torchjd(T: int) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    from torchjd.aggregation import NashMTL

    J = torch.linalg.cholesky(gramians("common", 0, 1, T, 3 * T)[0])
    # Their programs solve M w = 1/w. They stop when the weights move by less than 1e-6, or 1e-3 is left of an equation.
    expected = gk.NashMTL()(J)
    assert_near(NashMTL(T)(J), expected, expected.norm(), 2e-2)
    uncut = gk.NashMTL(None)(J) / gk.gramian(J).norm().sqrt()
    assert_near(NashMTL(T, 0.0)(J), uncut, uncut.norm(), 2e-2)
