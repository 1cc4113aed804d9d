"""MGDA: the shortest vector of the hull, exactly, however badly scaled or degenerate the gradients are."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.solvers import active_set
from gradkern.aggregators.solvers.min_norm import min_norm
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import assert_near

EXACT = 1e-11
"""Of the terms summed. Rows are solved for in float64; a condition of 1e5 is left to what is nearly degenerate."""


def shortfall(M: Tensor, w: Tensor) -> Tensor:
    """The largest shortfall of (Mw)_i >= wᵀMw, relative to the terms of both; zero rows do not count."""
    n = M.diagonal(dim1=-2, dim2=-1).sqrt()
    zero = n == 0
    n = torch.where(zero, 1.0, n)
    K, v = M / n.unsqueeze(-1) / n.unsqueeze(-2), w * n
    products, terms = (K @ v.unsqueeze(-1)).squeeze(-1), (K.abs() @ v.unsqueeze(-1)).squeeze(-1)
    short = (v * products).sum(-1, keepdim=True) / n - products
    relative = short / (terms + (v * terms).sum(-1, keepdim=True) / n)
    return relative.masked_fill(zero, 0.0).nan_to_num(0.0).amax(-1)


def assert_optimal(M: Tensor, tolerance: float = EXACT) -> None:
    w = min_norm(M)
    assert (w >= 0).all()
    assert_near(w.sum(-1), torch.ones(w.shape[:-1]), 1.0, 1e-14)
    assert shortfall(M, w).max() <= tolerance


def degenerate(kind: str, n: int, T: int, P: int) -> Tensor:
    """n matrices of T rows."""
    J = torch.randn(n, T, P, dtype=torch.float64)
    spread = 10 ** (6 * torch.rand(n, T, 1, dtype=torch.float64) - 3)
    before = J[:, : T - 1 : 2]
    if kind.startswith("antiparallel"):
        J[:, 1::2] = -before + 10 ** (-6 * torch.rand(n, 1, 1, dtype=torch.float64)) * J[:, 1::2]
    if kind.startswith("duplicate"):
        J[:, 1::2] = before
    if kind.startswith("integer"):
        J = torch.randint(-2, 3, (n, T, 4)).double()
    if kind.startswith("common"):
        J = J + 3 * torch.randn(n, 1, P, dtype=torch.float64)
    return J * spread if kind.endswith("scaled") else J


OF_ONE_SCALE = ("any", "antiparallel", "duplicate", "integer", "common")
KINDS = [*OF_ONE_SCALE, *(f"{kind}-scaled" for kind in OF_ONE_SCALE)]


@pytest.mark.parametrize("P", [3, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_no_task_falls_short(kind: str, P: int) -> None:
    torch.manual_seed(0)
    for T in (1, 2, 3, 6, 12):
        J = degenerate(kind, 100, T, P)
        assert_optimal(J @ J.mT)


def test_no_task_falls_short_of_what_hypothesis_finds() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=200)
    @hypothesis.given(st.data())
    def check(data: object) -> None:
        T, P = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))  # type: ignore[attr-defined]
        entries = st.lists(st.integers(-4, 4), min_size=T * P, max_size=T * P)
        powers = st.lists(st.integers(-3, 3), min_size=T, max_size=T)
        J = torch.tensor(data.draw(entries), dtype=torch.float64).view(T, P)  # type: ignore[attr-defined]
        J = J * 10.0 ** torch.tensor(data.draw(powers), dtype=torch.float64).unsqueeze(-1)  # type: ignore[attr-defined]
        # 1e-8: shortest vectors of length 0 among rows of all lengths, whose own equations are singular.
        assert_optimal(J @ J.mT, 1e-8)

    check()


@pytest.mark.parametrize("normalize", [None, "l2"])
@pytest.mark.parametrize("problem", ["conflicting", "duplicate", "zero", "tiny", "huge", "antiparallel"])
def test_as_its_twin(problem: str, normalize: str | None) -> None:
    for T in range(1, 7):
        torch.manual_seed(T)
        J = PROBLEMS[problem](T, 40)
        expected = reference.mgda(list(J), normalize)
        assert_near(gk.MGDA(normalize)(J), expected, J.norm(dim=1).max(), 1e-9)


def test_nearly_antiparallel_and_badly_scaled_rows_as_its_twin() -> None:
    """The length found is within 1e-7 of the shortest row's: the Gramian holds squares, and they 16 digits."""
    for T in (2, 3, 4, 5):
        torch.manual_seed(T)
        J = PROBLEMS["ill-conditioned"](T, 40)
        ours, shortest = gk.MGDA()(J).norm(), reference.mgda(list(J)).norm()
        assert abs(ours - shortest) <= 1e-7 * J.norm(dim=1).min()


def test_two_tasks_by_hand() -> None:
    """w_1 = (g_2 - g_1) · g_2 / ‖g_1 - g_2‖², cut to [0, 1]."""
    torch.manual_seed(0)
    J = torch.randn(500, 2, 3, dtype=torch.float64) * torch.tensor([[1.0], [3.0]])
    a, b = J.unbind(1)
    first = (((b - a) * b).sum(-1) / (a - b).square().sum(-1)).clamp(0, 1)
    assert_near(min_norm(J @ J.mT), torch.stack((first, 1 - first), -1), 1.0, 1e-12)


def test_a_long_frank_wolfe_comes_no_lower() -> None:
    torch.manual_seed(0)
    J = degenerate("any-scaled", 20, 5, 10)
    M = J @ J.mT
    w = torch.full((20, 5), 0.2, dtype=torch.float64)
    for _ in range(2000):
        slopes = (M @ w.unsqueeze(-1)).squeeze(-1)
        vertex = torch.nn.functional.one_hot(slopes.argmin(-1), 5).double()
        d = vertex - w
        curvature = (d * (M @ d.unsqueeze(-1)).squeeze(-1)).sum(-1)
        step = (-(d * slopes).sum(-1) / curvature.clamp_min(1e-300)).clamp(0, 1)
        w = w + step.unsqueeze(-1) * d
    square, ours = ((v.unsqueeze(-2) @ M @ v.unsqueeze(-1)).flatten() for v in (w, min_norm(M)))
    assert (ours <= square * (1 + 1e-12)).all()


def test_more_rounds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is fixed if nothing may be read."""
    torch.manual_seed(0)
    J = degenerate("antiparallel", 100, 12, 20)
    w = min_norm(J @ J.mT)
    monkeypatch.setattr(active_set, "rounds", lambda K, n: range(3 * n))
    assert torch.equal(w, min_norm(J @ J.mT))


def test_a_zero_gradient_is_left_out_of_the_hull() -> None:
    """It spoils nobody's weights; of nothing but zeros all weights are equal."""
    M = torch.stack([gk.gramian(conflicting(4, 9)) for _ in range(2)])
    M[0, [1, 3]] = M[0, :, [1, 3]] = 0
    losses = torch.tensor([1.0, math.nan, 3.0, 0.0])
    for method, given in ((gk.MGDA(), ()), (gk.MGDA("l2"), ()), (gk.MGDA("loss"), (losses,))):
        w = method.weights(M[:1] if given else M, *given)  # in the other Gramian the loss of 0 would divide
        some = [losses[[0, 2]]] if given else []
        assert_near(w[0, [0, 2]], method.weights(M[0, [0, 2]][:, [0, 2]], *some), 1.0, 1e-12)
        assert w[0, [1, 3]].tolist() == [0, 0]
        assert given or torch.equal(w[1], method.weights(M[1]))
    assert gk.MGDA().weights(torch.zeros(4, 4)).tolist() == [0.25] * 4


def test_a_task_that_does_not_reach_a_group_leaves_it_to_the_others() -> None:
    """Two tasks share a layer that the third one skips."""
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    hidden = first(torch.randn(4, 3))
    out = second(hidden)
    losses = [out.square().mean(), (out - 1).square().mean(), (hidden + 1).square().mean()]
    modules = torch.nn.ModuleList([first, second])
    info = gk.backward(losses, modules, aggregator=gk.MGDA(), groups="module", retain_graph=True)
    expected = torch.autograd.grad(losses[0], second.weight, retain_graph=True)
    assert info.weights.shape == (2, 3)
    assert info.weights[1, 2] == 0
    assert second.weight.grad.abs().max() > 1e-3 * expected[0].abs().max()


def test_absent_tasks_have_no_part_in_the_hull() -> None:
    M = torch.stack([gk.gramian(conflicting(5, 9)) for _ in range(2)])
    present = torch.tensor([True, False, True, True, False])
    expected = min_norm(M[:, present][:, :, present])
    M[:, 1], M[:, :, 1] = 0, 0  # one has no gradient yet
    w = gk.MGDA().solution(M, present).weights
    assert_near(w[:, present], expected, 1.0, 1e-12)
    assert (w[:, ~present] == 0).all()
    M[:, 4], M[:, :, 4] = math.nan, math.inf  # what one remembers has overflowed
    assert torch.equal(gk.MGDA().solution(M, present).weights, w)
    assert (gk.MGDA().solution(M, torch.zeros(5, dtype=torch.bool)).weights.nan_to_num(0.0) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gramian_that_is_not_finite(bad: float) -> None:
    M = torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(2)])
    expected = min_norm(M[1])
    M[0, 2, 2] = bad
    w = min_norm(M)
    assert w[0].isnan().all()
    assert torch.equal(w[1], expected)
    assert min_norm(M[0], torch.tensor([True, True, False])).isfinite().all()


def test_float32_gramians_that_rounding_left_indefinite() -> None:
    torch.manual_seed(0)
    J = degenerate("antiparallel-scaled", 200, 8, 20)
    M = (J @ J.mT).float().double()
    w = min_norm(M)
    assert (w >= 0).all()
    assert shortfall(M, w).max() <= 1e-5


def test_normalized_gradients_have_weights_of_their_directions_alone() -> None:
    J = conflicting(4, 9)
    longer = J * torch.tensor([[1.0], [1e3], [1e-3], [1e6]])
    w, w_longer = (gk.MGDA("l2").weights(gk.gramian(x)) for x in (J, longer))
    assert_near(w_longer, w, 1.0, 1e-9)
    assert not torch.allclose(gk.MGDA().weights(gk.gramian(longer)), w, atol=0.1)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (1, 1)])
def test_few_problems_and_small_ones(shape: tuple[int, ...]) -> None:
    assert torch.equal(gk.MGDA().weights(torch.ones(shape)), torch.ones(shape[:-1]))


def test_nothing_is_read() -> None:
    with FakeTensorMode():
        assert gk.MGDA("l2").weights(torch.ones(2, 4, 4)).shape == (2, 4)
    assert gk.MGDA().weights(torch.ones(2, 4, 4, device="meta")).shape == (2, 4)


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_gradients_are_divided_by_their_losses(normalize: str) -> None:
    """On a matrix and in a step; an absent task's loss counts nowhere."""
    J = torch.randn(4, 9, dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))
    scale = torch.tensor([0.1, 2.0, 30.0, 1.0], dtype=torch.float64)
    losses = [(p * J[t]).sum().square().add(1.0) * scale[t] for t in range(4)]
    grads = [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in losses]
    values = [loss.item() for loss in losses]
    method = gk.MGDA(normalize)
    w = method.weights(reference.gramian(grads), torch.stack(losses))
    expected = reference.mgda(grads, normalize, values)
    size = max(g.norm() for g in grads)
    assert_near(reference.combine(grads, w.tolist()), expected, size, 1e-9)
    info = gk.backward([losses[0], losses[1], None, losses[3]], [p], aggregator=method)
    some = [0, 1, 3]
    assert_near(p.grad, reference.mgda([grads[t] for t in some], normalize, [values[t] for t in some]), size, 1e-9)
    assert info.weights[2] == 0


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_a_loss_that_cannot_divide_is_named_and_changes_nothing(normalize: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    gk.backward(list(p.unbind()), [p], aggregator=gk.MGDA(normalize), shared=[p])
    grad = p.grad.clone()
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"losses\[1\] must be above 0, because gradients are .*; got {bad}"):
            gk.MGDA(normalize).weights(torch.eye(3).expand(2, 3, 3), torch.tensor([1.0, bad, 2.0]))
        with pytest.raises(ValueError, match=rf"losses\[1\] must be above 0, because gradients are .*; got {bad}"):
            gk.backward([p[0], p[1] - 1 + bad, p[2]], [p], aggregator=gk.MGDA(normalize), shared=[p])
        assert torch.equal(p.grad, grad)
        # A gradient of zero, as of a hinge loss that is met, is left out, and nothing is divided.
        w = gk.MGDA(normalize).weights(torch.diag(torch.tensor([1.0, 0.0, 4.0])), torch.tensor([1.0, bad, 2.0]))
        expected = reference.mgda([torch.eye(3)[0], 2 * torch.eye(3)[2]], normalize, [1.0, 2.0])
        assert_near(w * torch.tensor([1.0, 0.0, 2.0]), expected.float(), 1.0, 1e-6)
    absent = torch.tensor([True, False, True])
    w = gk.MGDA(normalize).solution(torch.eye(3)[None], absent, torch.tensor([1.0, -1.0, 2.0])).weights
    assert w.isfinite().all()


def test_losses_that_are_not_finite_give_no_number_and_missing_ones_are_named() -> None:
    M = reference.gramian(list(torch.randn(3, 5)))
    for bad in (math.inf, math.nan):
        assert gk.MGDA("loss").weights(M, torch.tensor([1.0, bad, 2.0])).isnan().all()
    with FakeTensorMode():  # where the host may not look, nothing is raised
        assert gk.MGDA("loss").weights(torch.ones(3, 3), torch.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match="losses must be given with normalize='loss', got None"):
        gk.MGDA("loss")(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"losses must have shape \(..., 3\) for 3 tasks, got \(2,\)"):
        gk.MGDA("loss+").weights(M, torch.ones(2))


@pytest.mark.parametrize("normalize", ["L2", 2, True])
def test_an_unknown_normalization_is_named(normalize: object) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=f"normalize must be None, 'l2', 'loss' or 'loss\\+', got {normalize!r}"
    ):
        gk.MGDA(normalize)  # type: ignore[arg-type]
